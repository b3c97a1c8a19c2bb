"""Continuous batching: B slots of one way of decoding, and a finished row's slot filled again.

The programs of `jaxspec.slots` do the work on the device; here the host decides who goes where, and reads what came out.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.metrics import counts
from jaxspec.recording import NOTHING, Recorder
from jaxspec.requests import MAX_NODES, Completion, Request, as_prompt, as_sampling, as_tokens, bucket_of, slack
from jaxspec.slots import Programs, Slots, empty_slots, programs
from jaxspec.types import ONE_DEVICE, Drafter, Placement, Rule, SpecParams, Target
from jaxspec.verify import greedy

FOREVER = 1 << 30


_COMPILATIONS: list[float] = []  # seconds of each compilation of this process, as JAX tells them


def _take_down(event: str, duration_secs: float, **kwargs: Any) -> None:
    del kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILATIONS.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_take_down)


class Routes(NamedTuple):
    """What a router says of R prompts.

    route: the drafter that serves each, -1 the base; task, confidence: its likeliest task and how likely.
    num_speculative_tokens: how many tokens to draft a round, where the engine has programs of several lengths.
    """

    route: np.ndarray
    task: np.ndarray
    confidence: np.ndarray
    num_speculative_tokens: np.ndarray | None = None


class Method(NamedTuple):
    """Who drafts.

    route: pooled features `[R, H]` -> Routes.
    drafter_params: (routes `[B]` of the slots) -> parameters of the drafter.
    family: route -> which of the engine's families of drafters it belongs to; 0 is the engine's own drafter.
    """

    name: str
    route: Callable[[np.ndarray], Routes]
    drafter_params: Callable[[np.ndarray], Any]
    family: Callable[[int], int] = lambda route: 0


def unrouted(features: np.ndarray) -> Routes:
    """The base drafter for every prompt."""
    none = np.full(len(features), -1)
    return Routes(none, none, np.ones(len(features)))


class Seconds(NamedTuple):
    """Wall clock since a call began: prefill with the target, routing, and all the rest."""

    prefill: float = 0.0
    route: float = 0.0
    decode: float = 0.0


class Compiled(NamedTuple):
    """A program that a call compiled: its name, what its shape is, and seconds of tracing and compiling."""

    name: str
    shape: str
    seconds: float


class Update(NamedTuple):
    """A row's new tokens since its last update; `completion` when it ended, and then the row's last update."""

    index: int
    ids: list[int]
    completion: Completion | None


@dataclass(frozen=True)
class _Row:
    """A request in a slot."""

    index: int
    request: Request
    route: int
    family: int
    num_speculative_tokens: int
    task: int
    confidence: float
    features: np.ndarray
    seen: int = 0


class Engine:
    """B slots of one way of decoding; the compiled programs and the caches outlive a call.

    Args:
        target, drafter, rule, recorder: what is composed, see `programs`; the rule `greedy` decodes every row greedily, any
            other serves rows of all sampling settings.
        shorter: drafters with the drafter's state that draft fewer tokens, by how many. With one slot a row has a program of
            its own length; more slots share the longest.
        further: other families of drafters, each with a rule and a state of its own, by how many tokens they draft; with one
            slot alone.
        target_params, prefill_params: the target's parameters, as the window wants them and as prompts do.
        slots: B, rows decoded together.
        room: tokens that a slot holds, see `room_of`.
        admit_rows: R, prompts read together; a request's text does not depend on who is read with it.
        placement: where parameters, which come placed, rows and state live; see `sharding.over`.
        smallest: the smallest prompt bucket; a large one means few programs, where compiling costs more than padding.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: Rule,
        target_params,
        *,
        stop_tokens: Sequence[int],
        slots: int,
        room: int,
        vocab_size: int,
        prefill_params=None,
        shorter: Mapping[int, Drafter] = MappingProxyType({}),
        further: Sequence[tuple[Rule, Mapping[int, Drafter]]] = (),
        admit_rows: int = 1,
        smallest: int = 32,
        recorder: Recorder = NOTHING,
        placement: Placement = ONE_DEVICE,
    ):
        if drafter.num_nodes > MAX_NODES:
            raise ValueError(
                f"the drafter drafts {drafter.num_nodes} tokens a round, the slots have room for {MAX_NODES}"
            )
        own = {"stop_tokens": stop_tokens, "recorder": recorder, "placement": placement}
        first = {**(shorter if slots == 1 else {}), drafter.num_nodes: drafter}
        families = [(rule, first), *(further if slots == 1 else ())]
        self.families = [{k: programs(target, one, law, **own) for k, one in each.items()} for law, each in families]
        self.programs = self.families[0][drafter.num_nodes]
        self.lengths = sorted({k for family in self.families for k in family})
        self.slack = slack(max(self.lengths))
        self._place = placement.rows
        self.slots, self.room, self.vocab_size, self.smallest = slots, room, vocab_size, smallest
        self.admit_rows, self.sampled = min(admit_rows, slots), rule is not greedy
        self.seconds = Seconds()
        self.compiled: list[Compiled] = []
        self._target_params = target_params
        self._prefill_params = target_params if prefill_params is None else prefill_params
        shape = {"slots": slots, "room": room, "sampled": self.sampled, "recorder": recorder, "placement": placement}
        longest = [(law, each[max(each)]) for law, each in families]
        self._empty = [jax.jit(empty_slots(target, one, law, **shape)) for law, one in longest]
        self._states: dict[Any, Slots] = {}  # of each family and structure of parameters, between calls

    def complete(self, requests: Sequence[Request], method: Method) -> list[Completion]:
        """Completions in the order of the requests; `self.seconds` tells what they took."""
        done = {update.index: update.completion for update in self.stream(requests, method) if update.completion}
        return [done[i] for i in range(len(requests))]

    def stream(
        self,
        requests: Iterable[Request],
        method: Method,
        *,
        rounds: int = FOREVER,
        ended: Callable[[int, list[int]], int | None] | None = None,
    ) -> Iterator[Update]:
        """Decodes requests as slots fall free; says what every row emitted after each chunk of at most `rounds` rounds.

        Args:
            rounds: FOREVER yields rows only when they end.
            ended: (index, new ids) -> how many of them to keep when the text ends there, for stop strings; else None.
        """
        self.seconds = Seconds()
        waiting = _Queue(requests, self)
        rows: dict[int, _Row] = {}
        kind, state = None, None
        while waiting or rows:
            while waiting and len(rows) < self.slots:
                group = waiting.take(min(self.admit_rows, self.slots - len(rows)))
                if state is not None and not rows:  # the next may be of another family
                    self._states[kind] = state
                    state = None
                kind, state = self._admit(state, method, rows, group)
            with self._clock("decode"):
                floor = len(rows) - min(self.admit_rows, len(waiting)) if waiting else 0
                limits = np.int32(floor), np.int32(rounds)
                state = self._chunk(rows, self._params(method, rows), state, *limits)
                state, updates = self._read(state, rows, rounds < FOREVER, ended)
            yield from updates
        if state is not None:
            self._states[kind] = state

    def _chunk(self, rows: dict[int, _Row], *arguments) -> Slots:
        row = max(rows.values(), key=lambda row: row.num_speculative_tokens)
        own = self.families[row.family][row.num_speculative_tokens]
        return self._call("chunk", f"{self.slots} x {own.num_nodes + 1} tokens", *arguments, programs=own)

    def _params(self, method: Method, rows: dict[int, _Row]) -> SpecParams:
        routes = np.full(self.slots, next((row.route for row in rows.values()), -1))
        for slot, row in rows.items():
            routes[slot] = row.route
        return SpecParams(self._target_params, method.drafter_params(routes))

    def _admit(
        self, state: Slots | None, method: Method, rows: dict[int, _Row], group: Sequence[tuple[int, Request]]
    ) -> tuple[Any, Slots]:
        """Reads prompts, chooses who drafts for them and gives them slots, of a state of its kind if there is none yet."""
        requests = [request for _, request in group]
        bucket = bucket_of(max(len(r.ids) for r in requests), self.smallest)
        with self._clock("prefill"):
            filler = [Request(ids=(0,), max_new_tokens=0)] * (self.admit_rows - len(requests))
            tokens = as_tokens([*requests, *filler], bucket)
            length = np.array([len(r.ids) for r in [*requests, *filler]], np.int32)
            target_state, features, seen = self._call(
                "prefill", _grid(tokens), self._prefill_params, *self._place((tokens, length))
            )
            features = np.asarray(features)
        with self._clock("route"):
            new = self._routed(method, group, features)
        with self._clock("decode"):
            empty = [slot for slot in range(self.slots) if slot not in rows][: len(requests)]
            rows.update(zip(empty, new, strict=True))
            family, params = new[0].family, self._params(method, rows)
            kind = family, jax.tree.structure(params.drafter)
            state = self._states.pop(kind, None) if state is None else state
            state = self._empty[family](params) if state is None else state
            where = np.array([*empty, *[self.slots] * (self.admit_rows - len(empty))], np.int32)
            prompt = as_prompt(requests, self.admit_rows, bucket, [row.route for row in new])
            sampling = as_sampling(requests, self.admit_rows, self.vocab_size) if self.sampled else None
            own = state, self._place(prompt)._replace(features=seen), target_state, self._place(sampling), where
            admit = self.families[family][max(self.families[family])]
            return kind, self._call("admit", _grid(tokens), params, *own, programs=admit)

    def _routed(self, method: Method, group: Sequence[tuple[int, Request]], features: np.ndarray) -> list[_Row]:
        """The requests' rows. Their draft length is their own wish, else the router's, else the longest."""
        found, rows = method.route(features), []
        said = found.num_speculative_tokens
        for i, (index, request) in enumerate(group):
            route = int(found.route[i]) if request.route is None else request.route
            lengths = self.families[method.family(route)]
            wanted = request.num_speculative_tokens
            wanted = wanted if wanted is not None else max(lengths) if said is None else int(said[i])
            k = min((k for k in lengths if k >= wanted), default=max(lengths))
            own = int(found.task[i]), float(found.confidence[i]), features[i]
            rows.append(_Row(index, request, route, method.family(route), k, *own))
        return rows

    def _read(self, state: Slots, rows: dict[int, _Row], streaming: bool, ended) -> tuple[Slots, list[Update]]:
        """Updates of the rows; finished ones are taken out of `rows`, and those that `ended` ends are halted."""
        done, length = jax.device_get((state.spec.done, state.spec.length))
        if not streaming and not any(done[slot] for slot in rows):
            return state, []
        tokens, stopped = jax.device_get((state.spec.tokens, state.spec.stopped))
        updates, finished, halted = [], {}, np.zeros(self.slots, bool)
        for slot, row in list(rows.items()):
            if not (streaming or done[slot]):
                continue
            begin = len(row.request.ids) + row.seen
            new = tokens[slot, begin : length[slot]].tolist()
            keep = ended(row.index, new) if ended else None
            if keep is not None:
                new, halted[slot] = new[:keep], not done[slot]
            if keep is not None or done[slot]:
                reason = "stop" if keep is not None or stopped[slot] else "length"
                finished[slot] = begin + len(new), reason
            else:
                rows[slot] = replace(row, seen=row.seen + len(new))
            updates.append((slot, Update(row.index, new, None)))
        completions = self._completions(state, rows, finished, tokens)
        state = self._call("halt", "", state, halted) if halted.any() else state
        return state, [update._replace(completion=completions.get(slot)) for slot, update in updates]

    def _completions(self, state: Slots, rows: dict[int, _Row], finished: dict, tokens) -> dict[int, Completion]:
        """Completions of slots `{slot: (end, reason)}`, which fall free."""
        if not finished:
            return {}
        history, record = jax.device_get((state.history, state.record))
        most = max(one.num_nodes for family in self.families for one in family.values())
        out = {}
        for slot, (end, reason) in finished.items():
            row = rows.pop(slot)
            begin = len(row.request.ids)
            own = history.rounds[slot], history.blocks[slot]
            program = self.families[row.family][row.num_speculative_tokens]
            cost = {"num_nodes": program.num_nodes, "num_calls": program.num_calls}
            out[slot] = Completion(
                ids=tokens[slot, begin:end].tolist(),
                finish_reason=reason,
                counts=counts(*own, begin, end, most, **cost),
                route=row.route,
                num_speculative_tokens=row.num_speculative_tokens,
                task=row.task,
                confidence=row.confidence,
                features=row.features,
                record=jax.tree.map(lambda leaf, slot=slot: np.array(leaf[slot]), record),  # a view keeps all rows
            )
        return out

    def warm_up(self, method: Method, buckets: Iterable[int]) -> None:
        """Compiles all that prompts of these buckets need; after it nothing compiles."""
        for bucket, k in itertools.product(buckets, self.lengths):
            self.complete([Request(ids=(0,) * bucket, max_new_tokens=1, num_speculative_tokens=k)], method)
        for kind, state in self._states.items():
            self._states[kind] = self._call("halt", "", state, np.zeros(self.slots, bool))

    def release(self) -> None:
        """Gives back the slots' memory, which is kept from call to call for every kind of parameters."""
        self._states.clear()

    def _call(self, name: str, shape: str, *arguments, programs: Programs | None = None):
        """Calls a program, and takes down what it compiles."""
        program = getattr(programs or self.programs, name)
        known, start = len(_COMPILATIONS), time.perf_counter()
        out = program(*arguments)
        if len(_COMPILATIONS) > known:
            self.compiled.append(Compiled(name, shape, time.perf_counter() - start))
        return out

    def _clock(self, name: str):
        return _Clock(self, name)


class _Clock:
    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *error):
        spent = time.perf_counter() - self.start
        seconds = self.engine.seconds
        self.engine.seconds = seconds._replace(**{self.name: getattr(seconds, self.name) + spent})


class _Queue:
    """Requests in order of arrival, looked at a little ahead so that prompts of one bucket are read together."""

    def __init__(self, requests: Iterable[Request], engine: Engine):
        self.source = enumerate(requests)
        self.ahead: deque[tuple[int, Request]] = deque()
        self.look, self.engine = 4 * engine.admit_rows, engine
        self._fill()

    def __len__(self) -> int:
        return len(self.ahead)

    def take(self, number: int) -> list[tuple[int, Request]]:
        """The first request and up to `number` - 1 others of its bucket."""
        bucket = lambda item: bucket_of(len(item[1].ids), self.engine.smallest)
        own = [item for item in self.ahead if bucket(item) == bucket(self.ahead[0])][:number]
        for item in own:
            self.ahead.remove(item)
        self._fill()
        return own

    def _fill(self) -> None:
        while len(self.ahead) < self.look and (item := next(self.source, None)) is not None:
            self._check(item[1])
            self.ahead.append(item)

    def _check(self, request: Request) -> None:
        own = len(request.ids)
        need = max(bucket_of(own, self.engine.smallest), own + request.max_new_tokens + self.engine.slack)
        if need > self.engine.room:
            raise ValueError(
                f"request {request.number} needs a room of {need} tokens, the slots have {self.engine.room}"
            )


def _grid(tokens: np.ndarray) -> str:
    return f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
