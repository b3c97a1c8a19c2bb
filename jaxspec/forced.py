"""Teacher forcing: what a drafter says along a text that the target has emitted already, and the rounds that follow from it.

Under greedy decoding a drafter sees nothing but the target's own tokens, so one pass over a finished text tells each round
that any draft length would have had there, exactly; the target does not run.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.align import Batch
from jaxspec.ancestry import ancestry, depths
from jaxspec.packing import as_batch, pack, places
from jaxspec.requests import MAX_DRAFT, bucket_of
from jaxspec.store.models import Pair
from jaxspec.store.recalibration import Sample
from jaxspec.store.traces import Texts, Traces
from jaxspec.transformer import LMConfig, forward, unembed
from jaxspec.types import Draft, Drafter, Prompt, Verdict

ROWS = 8  # packed rows in a pass


class Rounds(NamedTuple):
    """How many rounds a text takes, and up to its end the tokens drafted and accepted in them."""

    rounds: int
    drafted: int
    accepted: int


def log_q(
    config: LMConfig, weights: dict, adapter, tokens: Array, segments: Array, at: Array, vocab_size: int
) -> Array:
    """A drafter's log-probabilities at places `at [R, M]` of packed rows `[R, T]`: `[R, M, V]`."""
    hidden = forward(config, weights, tokens, segments=segments, adapter=adapter)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return jax.nn.log_softmax(unembed(config, weights, hidden, vocab_size), axis=-1)


def greedy(config: LMConfig, weights: dict, tokens: Array, segments: Array, at: Array, vocab_size: int) -> Array:
    """A drafter's best tokens at those places: `[R, M]`."""
    return jnp.argmax(log_q(config, weights, None, tokens, segments, at, vocab_size), axis=-1)


def agreements(
    best: Callable[..., Array], traces: Traces | Texts, examples: Sequence[int], row_tokens: int
) -> list[np.ndarray]:
    """For each example its output places `[O]` at which a drafter's best token is the target's.

    Args:
        best: (tokens, segments, at) -> the drafter's best tokens; compiled once, for packed rows of `row_tokens`.
    """
    found: dict[int, np.ndarray] = {}
    for group, batch in packed(traces, examples, row_tokens):
        said = best(batch.tokens, batch.segments, batch.at)
        found |= apart(group, batch, said == batch.top_ids[..., 0])
    return [found[i] for i in examples]


def packed(traces: Traces | Texts, examples: Sequence[int], row_tokens: int) -> Iterator[tuple[list[list[int]], Batch]]:
    """The examples in batches of ROWS packed rows, and which are in each row."""
    if not examples:
        return
    rows = pack([len(own) for own in traces.tokens], examples, row_tokens)
    room = places(traces, rows, row_tokens)
    for start in range(0, len(rows), ROWS):
        group = rows[start : start + ROWS]
        yield group, as_batch(traces, [*group, *[[]] * (ROWS - len(group))], row_tokens, room)


def apart(group: Sequence[Sequence[int]], batch: Batch, values: Array) -> dict[int, np.ndarray]:
    """What packed values `[R, M, ...]` say of each example's output places: `[O, ...]`."""
    found, values = {}, jax.device_get(values)
    for r, row in enumerate(group):
        owner = batch.segments[r, batch.at[r]]
        for segment, i in enumerate(row):
            found[i] = values[r, batch.mask[r] & (owner == segment)]
    return found


def proposing(
    drafter: Drafter, traces: Traces | Texts, examples: Sequence[int]
) -> tuple[Callable[[Any, Array, Array], tuple[Draft, Array]], int, int]:
    """How a drafter without weights goes on at every output place of a text, with the text's width S and O for all of them.

    It is (the drafter's parameters, text `[S]`, its prompt's length) -> drafts of O rows, and the places `[O, N]` that their
    nodes speak of. The drafter takes the text token by token, and may learn of it as it goes: what it knows at a place must
    not depend on the rounds before.
    """
    slots = bucket_of(max(map(len, traces.tokens)) + drafter.num_nodes)
    room = max((len(traces.tokens[i]) - int(traces.prompt_length[i]) for i in examples), default=0)

    def propose(params: Any, text: Array, begin: Array) -> tuple[Draft, Array]:
        nothing, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
        prompt = Prompt(text[None], begin[None], jax.random.key(0)[None], one, one, nothing)

        def go_on(state: Any, length: Array) -> tuple[Any, Draft]:
            draft, state = drafter.propose(params, state, text[None], length[None], None, None)
            said = Verdict(text[length][None, None], one, nothing, nothing[None])
            return drafter.commit(params, state, said, None), draft

        length = begin + jnp.arange(room)
        _, drafts = jax.lax.scan(go_on, drafter.init(params, prompt, slots), length)
        draft = jax.tree.map(lambda leaf: leaf[:, 0], drafts)
        return draft, length[:, None] + depths(_lineage(draft))[:, 1:] - 1

    return propose, slots, room


def reached(draft: Draft, kept: Array) -> Array:
    """How far into drafts a round goes, of which so many first nodes are drafted.

    Args:
        kept: `[O, N]` probability that a node is followed where that above it was.

    Returns:
        `[O, N + 1, N + 1]` probability that no fewer tokens are accepted than the last axis counts, by nodes drafted.
    """
    lineage = _lineage(draft)
    width = lineage.shape[-1]
    counts = jnp.arange(width - 1) < draft.num_drafted[:, None]
    own = jnp.pad(jnp.where(counts, kept, 0.0), ((0, 0), (1, 0)), constant_values=1.0)
    row = jnp.where(lineage, own[:, None], 1.0).prod(-1)
    # No two children of a node are alike, so that at most one row of a level is reached.
    return jnp.cumsum(row[..., None] * jax.nn.one_hot(depths(lineage), width), axis=1)


def _lineage(draft: Draft) -> Array:
    chain = jnp.broadcast_to(jnp.arange(draft.tokens.shape[1]), draft.tokens.shape)
    return ancestry(chain if draft.parents is None else draft.parents)


def lookups(drafter: Drafter, traces: Traces | Texts, examples: Sequence[int], params: Any = ()) -> list[np.ndarray]:
    """For each example `[O, N + 1]` tokens that one without weights would have had accepted, by place and nodes drafted."""
    propose, slots, _ = proposing(drafter, traces, examples)

    @jax.jit
    def right(params: Any, tokens: Array, best: Array, begin: Array) -> Array:
        draft, place = propose(params, tokens, begin)
        said = best[jnp.minimum(place, slots - 1)]
        return reached(draft, draft.tokens == said)[..., 1:].sum(-1)

    found = []
    for i in examples:
        text, begin = traces.tokens[i], int(traces.prompt_length[i])
        left = np.arange(len(text) - begin, 0, -1)  # what lies behind the text is no token
        best = np.concatenate(
            [text[:begin], traces.top_ids[i][: len(left), 0]]
        )  # the target's own, whatever the log says
        row = lambda ids: np.pad(ids, (0, slots - len(ids)))
        run = np.asarray(right(params, row(text), row(best), begin)).astype(int)
        found.append(np.minimum(run[: len(left)], left[:, None]))
    return found


def agreeing(agrees: np.ndarray) -> np.ndarray:
    """How many places from each on agree in a row: `[O]` of booleans -> `[O]`."""
    run = np.zeros(len(agrees) + 1, np.int64)
    for place in reversed(range(len(agrees))):
        run[place] = run[place + 1] + 1 if agrees[place] else 0
    return run[:-1]


def chain(run: np.ndarray, num_speculative_tokens: int) -> Rounds:
    """Greedy rounds of one text, of whose places `run [O]` says how many drafted tokens would be accepted from there on.

    Every round, the first of them after the prompt, drafts so many tokens and emits those accepted and one more.
    """
    end = len(run)
    at, rounds, drafted, accepted = 0, 0, 0, 0
    while at < end:
        kept = min(int(run[at]), num_speculative_tokens)
        rounds, accepted = rounds + 1, accepted + kept
        drafted += min(num_speculative_tokens, end - at)
        at += kept + 1
    return Rounds(rounds, drafted, accepted)


def acceptance_length(texts: Sequence[np.ndarray], num_speculative_tokens: int) -> float:
    """Tokens a round over all texts; 1 where there is no text."""
    rounds = sum(chain(run, num_speculative_tokens).rounds for run in texts)
    return sum(map(len, texts)) / rounds if rounds else 1.0


class Judge:
    """What drafters of one shape would have had accepted on the calibrate split.

    Args:
        texts: how many of each task count.
    """

    def __init__(self, pair: Pair, sample: Sample, texts: int):
        self.texts, self.examples = sample.texts, sample.of_each(texts)
        self._pair, self._best = pair, _best_of(pair)
        self._row_tokens = bucket_of(max(map(len, sample.texts.tokens)))

    def of(self, pair: Pair) -> "Judge":
        """A judge by the same texts of drafters of another shape."""
        if pair.draft.config == self._pair.draft.config:
            return self
        other = copy.copy(self)
        other._pair, other._best = pair, _best_of(pair)
        return other

    def lengths(self, weights: dict) -> list[list[float] | None]:
        """Tokens a round by task and number of drafted tokens from 0 on; None for a task without texts."""
        best = partial(self._best, weights)
        found = [agreements(best, self.texts, rows, self._row_tokens) for rows in self.examples]
        of_chain = lambda agrees: np.minimum(agreeing(agrees)[:, None], np.arange(MAX_DRAFT + 1))
        return [_by_length([of_chain(agrees) for agrees in texts]) for texts in found]

    def looked_up(self, drafter: Drafter, params: Any = ()) -> list[list[float] | None]:
        """The same of a drafter without weights that drafts MAX_DRAFT nodes, of which fewer are the first ones."""
        found = iter(lookups(drafter, self.texts, [i for rows in self.examples for i in rows], params))
        return [_by_length([next(found) for _ in rows]) for rows in self.examples]


@lru_cache(maxsize=8)
def _best_of(pair: Pair) -> Callable[..., Array]:
    return jax.jit(partial(greedy, pair.draft.config, vocab_size=pair.vocab_size))


def _by_length(texts: Sequence[np.ndarray]) -> list[float] | None:
    """Of texts whose places `[O, N + 1]` say how many tokens would be accepted there, by how many nodes are drafted."""
    if not texts:
        return None
    return [acceptance_length([own[:, k] for own in texts], k) for k in range(MAX_DRAFT + 1)]
