"""Prompts as text in, completions as text out: `generate` and `stream` over a pool.

pool = load_pool("runs/demo/pool")
for completion in generate(pool, ["What is 2 + 2?"], max_new_tokens=32):
    print(completion.text, completion.drafter, completion.num_accepted_tokens)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxspec import pooled, recording, serving, verify
from jaxspec.config import UserError
from jaxspec.engine import FOREVER, Engine, Method
from jaxspec.requests import MAX_DRAFT, SETTINGS, Request, bucket_of, checked, room_of
from jaxspec.requests import Completion as Row
from jaxspec.router import ADAPTIVE, TRUNK
from jaxspec.store.facts import draft_length
from jaxspec.store.families import drafter_name, options, routes_outside
from jaxspec.store.models import encode
from jaxspec.store.names import drafter_names
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Line

Prompt = str | Sequence[Mapping[str, str]]
STREAM_ROUNDS = 4  # rounds between two looks at what rows emitted, where someone waits for it
STOP_ROUNDS = 16  # the same where only a stop string has to be noticed
LOST = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a prompt was answered with.

    text: without special tokens, cut before a stop string; token_ids: to the token that ended it, that one included.
    finish_reason: `stop` (a stop token or string) or `length`.
    task: the router's likeliest task; route_confidence: of that task; drafter: who drafted, one of `Pool.names`, of
    `Pool.added` or of a further family.
    num_drafts: target calls after prefill; num_draft_tokens, num_accepted_tokens: of whole blocks, as vLLM counts them;
        num_accepted_tokens_per_pos: accepted by place in the block, up to where the text ends.
    logprobs: the target's log probability of each token, in nats: as it is, and after temperature, top-k and top-p.
    log_weights: what a row that changes its drafter trusted each of `pooled.candidates` with in the end, in nats.
    features: `[H]` what the router saw of the prompt.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    task: str | None
    drafter: str
    route_confidence: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]
    logprobs: list[float] | None = None
    sampling_logprobs: list[float] | None = None
    log_weights: list[float] | None = None
    features: np.ndarray = field(kw_only=True, repr=False, compare=False)


class Piece(NamedTuple):
    """A part of the answer to prompt `index`: whole characters, never part of a stop string; the last has `completion`."""

    index: int
    text: str
    completion: Completion | None


class Ask(NamedTuple):
    """A request and the strings that end its answer."""

    request: Request
    stops: tuple[str, ...] = ()


def generate(pool: Pool, prompts: Iterable[Prompt], **settings: Any) -> Iterator[Completion]:
    """Answers prompts in their order, routed and lossless.

    Args:
        prompts: texts, or chats as lists of `{"role": ..., "content": ...}`; all of them are read before the first is answered.
        settings: `max_new_tokens=128, temperature=0.0, top_k=None, top_p=None, seed=0, stop=(), drafter=None` of every
            prompt; `batch=8` slots; `num_speculative_tokens=None`, which takes what calibration chose for as many; and
            `acceptance="rejection"` or `"gumbel"`, the rule above temperature 0, always the latter where tables draft;
            `logprobs=False`.

    Raises:
        UserError: an empty prompt, one longer than the models' positions allow, an unknown drafter, a setting out of range.
    """
    ready: dict[int, Completion] = {}
    following = 0
    for piece in _pieces(pool, prompts, rounds=STOP_ROUNDS if settings.get("stop") else FOREVER, **settings):
        if piece.completion:
            ready[piece.index] = piece.completion
        while following in ready:
            yield ready.pop(following)
            following += 1


def stream(pool: Pool, prompts: Iterable[Prompt], **settings: Any) -> Iterator[Piece]:
    """Answers prompts piece by piece as their tokens are verified; settings as in `generate`."""
    pieces = _pieces(pool, prompts, rounds=STREAM_ROUNDS, **settings)
    return (piece for piece in pieces if piece.text or piece.completion)


def serve(pool: Pool, engine: Engine, method: Method, asks: Sequence[Ask], *, rounds: int) -> Iterator[Piece]:
    """Pieces of the answers to `asks` as the engine says them; with `rounds` FOREVER one piece an answer."""
    readers = [Reader(pool.pair.tokenizer, ask.stops) for ask in asks]
    ended = lambda index, ids: readers[index].push(ids)
    for update in engine.stream([ask.request for ask in asks], method, rounds=rounds, ended=ended):
        row = update.completion
        yield Piece(
            update.index,
            readers[update.index].take(ended=row is not None),
            _completion(pool, update.index, readers[update.index].text, row) if row else None,
        )


def drafter_named(facts: dict[str, Any], name: Any) -> int | None:
    """The route that a name asks for: a task, its label, a whole drafter of the pool or added to it, or `adaptive`.

    None for None, which leaves it to the router.
    """
    if name is None:
        return None
    by_size = sorted(range(len(facts["tasks"])), key=lambda task: facts["sizes"][task])
    labels = {label: task for task in by_size if (label := facts["labels"][task])}  # the largest has the name
    whole = {drafter_names(facts)[-1]: TRUNK, **routes_outside(facts)}
    names = {**whole, **labels, **{task: i for i, task in enumerate(facts["tasks"])}}
    names.setdefault("adaptive", ADAPTIVE)
    if isinstance(name, str) and name in whole.keys() & labels.keys():
        task = facts["tasks"][labels[name]]
        raise UserError(
            f"{name!r} is the label of {task!r} and the name of another drafter of the pool; say {task!r}, or rename the other"
        )
    if not isinstance(name, str) or name not in names:
        raise UserError(f"no drafter {name!r} in this pool; it has {', '.join(map(str, names))}")
    return names[name]


@lru_cache(maxsize=4)
def engine_of(
    pool: Pool, families: tuple[tuple[str, tuple[int, ...]], ...], rule: str, slots: int, room: int, log_probs: bool
) -> Engine:
    """An engine for a pool; asked again in the same shape it is the same, with all that it has compiled."""
    recorder = recording.logprobs(room) if log_probs else recording.NOTHING
    shape = {"slots": slots, "room": room, "recorder": recorder}
    return pooled.choosing(pool, families, rule, **shape)


@lru_cache(maxsize=4)
def adaptive_engine_of(pool: Pool, num_nodes: int, rule: str, slots: int, room: int, log_probs: bool) -> Engine:
    """As `engine_of`, of trigram tables."""
    recorder = recording.logprobs(room) if log_probs else recording.NOTHING
    return pooled.adapting(pool, num_nodes, rule, slots=slots, room=room, recorder=recorder)


def nodes_of_tables(asked: int | None) -> int:
    """Of a tree of trigram tables that was asked for: as many, or as the longest chain has tokens, whatever pays."""
    return MAX_DRAFT if asked is None else checked("num_speculative_tokens", asked)


def rule_for(requests: Iterable[Request], acceptance: str) -> str:
    """Greedy programs where every request is greedy, else the acceptance rule asked for."""
    return acceptance if any(request.temperature > 0 for request in requests) else "greedy"


def room_for(requests: Iterable[Request]) -> int:
    """Room of the slots for these requests, rounded so that other calls have the same."""
    own = list(requests)
    longest = bucket_of(max((len(r.ids) for r in own), default=1))
    return room_of(longest, bucket_of(max((r.max_new_tokens for r in own), default=1)))


class Reader:
    """One answer's text as its tokens come: holds back half characters and what may become a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text, self.ids = "", []
        self._taken = 0
        self._settled, self._begin, self._end = "", 0, 0  # text of whole characters; the tokens that its end hangs on

    def push(self, ids: Sequence[int]) -> int | None:
        """Takes new ids; how many of them belong to the answer when a stop string ends it, else None."""
        for number in range(1, len(ids) + 1) if self.stops else ():
            self._read(ids[number - 1 : number])
            found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
            if found:
                self.text = self.text[: min(found)]
                return number
        if not self.stops:
            self._read(ids)
        return None

    def take(self, ended: bool) -> str:
        """The text that is certain by now and was not taken yet."""
        certain = len(self.text) if ended else max(self._taken, len(self.text) - self._doubtful())
        piece, self._taken = self.text[self._taken : certain], certain
        return piece

    def _read(self, ids: Sequence[int]) -> None:
        """Decodes from a few settled tokens on: how a token reads depends on the ones before it."""
        self.ids += ids
        say = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)
        before, now = say(self.ids[self._begin : self._end]), say(self.ids[self._begin :])
        self.text = self._settled + now[len(before) :]
        if len(now) > len(before) and not now.endswith(LOST):
            self._settled, self._begin, self._end = self.text, self._end, len(self.ids)

    def _doubtful(self) -> int:
        """Length of the text's end that may still change: lost bytes, or the beginning of a stop string."""
        whole = self.text.rstrip(LOST)  # lost bytes may yet become the character that a stop string goes on with
        grows = lambda stop: next((n for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n])), 0)
        return len(self.text) - len(whole) + max(map(grows, self.stops), default=0)


def _pieces(
    pool: Pool,
    prompts: Iterable[Prompt],
    *,
    rounds: int,
    batch: int = 8,
    num_speculative_tokens: int | None = None,
    acceptance: str = "rejection",
    logprobs: bool = False,
    stop: str | Sequence[str] = (),
    drafter: str | None = None,
    max_new_tokens: int = 128,
    **settings: Any,
) -> Iterator[Piece]:
    """`serve` for prompts of one setting."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if acceptance not in verify.SAMPLED:
        raise UserError(f"acceptance {acceptance!r} is no rule; give one of {', '.join(verify.SAMPLED)}")
    if type(batch) is not int or batch < 1:
        raise UserError(f"batch {batch!r} will not do; give a whole number from 1")
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise UserError(f"unknown setting {min(unknown)!r}; see the documentation of jaxspec.generate")
    own = {name: checked(name, value) for name, value in {"max_new_tokens": max_new_tokens, **settings}.items()}
    own["route"] = route = drafter_named(pool.facts, drafter)
    asks = [
        Ask(Request(ids=_ids(pool, number, prompt, max_new_tokens), number=number, **own), stops)
        for number, prompt in enumerate(prompts)
    ]
    requests = [ask.request for ask in asks]
    shape = batch, room_for(requests), logprobs
    if own["route"] == ADAPTIVE:  # what tables draft is not drawn, so that the other rule accepts no more
        engine = adaptive_engine_of(pool, nodes_of_tables(num_speculative_tokens), rule_for(requests, "gumbel"), *shape)
        return serve(pool, engine, serving.always(pool, "adaptive", batch), asks, rounds=rounds)
    if drafter is not None:  # the length that a row has of its own is for the drafter that the pool would choose
        num_speculative_tokens = draft_length(pool.facts, num_speculative_tokens, slots=batch)
    among = options(pool.facts, num_speculative_tokens, batch)
    engine = engine_of(pool, among.families, rule_for(requests, acceptance), *shape)
    method = serving.chosen(pool, batch, among, bank=drafter is not None)
    if route is not None and route in routes_outside(pool.facts).values():
        method = serving.outside(pool, route, batch, method)
    return serve(pool, engine, method, asks, rounds=rounds)


def _ids(pool: Pool, number: int, prompt: Prompt, max_new_tokens: int) -> tuple[int, ...]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(own) for own in prompt]
    line = Line(str(number), messages, None, None, {}, f"prompt {number}")
    if not line.text.strip():
        raise UserError(f"{line.source} is empty; write a text")
    ids = encode(pool.pair.tokenizer, line)
    room = pool.pair.longest - max_new_tokens
    if len(ids) > room:
        raise UserError(
            f"{line.source} has {len(ids)} tokens, {room} is the most: the models' {pool.pair.longest} positions less "
            f"max_new_tokens {max_new_tokens}; shorten it or lower max_new_tokens"
        )
    return ids


def _completion(pool: Pool, index: int, text: str, row: Row) -> Completion:
    parts = row.record if type(row.record) is tuple else (row.record,)
    said = next((part for part in parts if isinstance(part, recording.LogProbs)), None)
    choices = next((part for part in parts if isinstance(part, recording.Choices)), None)
    of = lambda values: np.round(values[: len(row.ids)], 5).tolist()
    return Completion(
        index=index,
        text=text,
        token_ids=row.ids,
        finish_reason=row.finish_reason,
        task=pool.tasks[row.task] if row.task >= 0 else None,
        drafter=drafter_name(pool.facts, row.route),
        route_confidence=round(row.confidence, 4),
        num_drafts=int(row.counts.num_drafts),
        num_draft_tokens=int(row.counts.num_draft_tokens),
        num_accepted_tokens=int(row.counts.num_accepted_tokens),
        num_accepted_tokens_per_pos=row.counts.accepted_by_position.tolist(),
        logprobs=of(said.raw) if said else None,
        sampling_logprobs=of(said.sampled) if said else None,
        log_weights=np.round(choices.log_weights.astype(float), 4).tolist() if choices else None,
        features=row.features,
    )
