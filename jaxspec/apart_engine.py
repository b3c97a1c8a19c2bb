"""Slots whose halves live on two meshes: the drafter's state, history and record on one, texts and the target's on the other.

The engine stays the engine; its programs are those of `jaxspec.slots` cut in two, with the loop of `jaxspec.apart` for a
chunk.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from jaxspec.apart import apart
from jaxspec.engine import Engine
from jaxspec.metrics import remember
from jaxspec.recording import NOTHING, Recorder
from jaxspec.sharding import held, moved, over, param_specs, place
from jaxspec.slots import Programs, Slots, empty_slots, fresh, insert, programs
from jaxspec.speculate import speculator
from jaxspec.types import Drafter, Prompt, Rule, SpecParams, SpecState, Target


class ApartEngine(Engine):
    """An `Engine` whose drafter and target work at once, on meshes of their own; chunks end when all of their rows have.

    Args:
        meshes: the target's and the drafter's, see `sharding.sides`; the slots divide over the rows of both.
        settings: what an `Engine` takes, its parameters from anywhere; all slots are admitted together, and no recorder can
            read scores.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: Rule,
        target_params: Any,
        *,
        meshes: tuple[Mesh, Mesh],
        slots: int,
        room: int,
        stop_tokens: Sequence[int],
        prefill_params: Any = None,
        recorder: Recorder = NOTHING,
        **settings: Any,
    ):
        wide, self._narrow = meshes
        placed = lambda own: None if own is None else place(own, param_specs(own), wide)
        known = {"slots": slots, "room": room, "recorder": recorder}
        of_engine = settings | known | {"admit_rows": slots, "placement": over(wide), "stop_tokens": stop_tokens}
        own = target, drafter, rule
        super().__init__(*own, placed(target_params), prefill_params=placed(prefill_params), **of_engine)
        self.programs = apart_programs(*own, stop_tokens=stop_tokens, recorder=recorder, meshes=meshes)
        self.families = [{drafter.num_nodes: self.programs}]
        self._empty = [_empty(empty_slots(*own, sampled=self.sampled, **known), meshes)]
        self._placed: dict[int, tuple[Any, Any]] = {}

    def _params(self, method, rows) -> SpecParams:
        own = super()._params(method, rows)
        # A method has one tree for the same routes; it is kept with its copy, so that no other gets its id.
        if id(own.drafter) not in self._placed:
            copy = place(own.drafter, param_specs(own.drafter, "drafter"), self._narrow)
            self._placed[id(own.drafter)] = own.drafter, copy
        return own._replace(drafter=self._placed[id(own.drafter)][1])


def apart_programs(
    target: Target,
    drafter: Drafter,
    rule: Rule,
    *,
    stop_tokens: Sequence[int],
    recorder: Recorder,
    meshes: tuple[Mesh, Mesh],
) -> Programs:
    """As `slots.programs`, of states in two places; a chunk goes on until all rows have ended, whatever its limits are."""
    spec = speculator(target, drafter, rule, stop_tokens=stop_tokens)
    there, here = _movers(meshes)
    on_target, on_drafter = held(meshes[0], "target"), held(meshes[1], "drafter")
    fold = lambda stats, info: (remember(stats[0], info), recorder.fold(stats[1], info))
    loop = apart(spec, fold, target=meshes[0], drafter=meshes[1])

    @partial(jax.jit, donate_argnums=1)
    def begin(params, half: tuple, prompt: Prompt, sampling, where: Array) -> tuple[tuple, SpecState]:
        rows = fresh(spec, recorder, SpecParams((), params), prompt, (), sampling)
        half = on_drafter(insert(half, (rows.spec.drafter, rows.history, rows.record), where))
        return half, rows.spec._replace(drafter=())

    @partial(jax.jit, donate_argnums=0)
    def enter(text: SpecState, rows: SpecState, where: Array) -> SpecState:
        return on_target(insert(text, rows, where))

    def admit(params: SpecParams, slots: Slots, prompt: Prompt, target_state, sampling, where) -> Slots:
        text, half = _parted(slots)
        half, rows = begin(params.drafter, half, here(prompt), here(sampling), where)
        return _whole(enter(text, there(rows._replace(target=target_state)), where), half)

    def chunk(params: SpecParams, slots: Slots, floor, rounds) -> Slots:
        del floor, rounds
        state, stats = loop(params, slots.spec, (slots.history, slots.record))
        return Slots(state, *stats)

    @partial(jax.jit, donate_argnums=0)
    def end(text: SpecState, ended: Array) -> SpecState:
        return on_target(text._replace(done=text.done | ended))

    def halt(slots: Slots, ended) -> Slots:
        text, half = _parted(slots)
        return _whole(end(text, ended), half)

    prefill = programs(target, drafter, rule, stop_tokens=stop_tokens).prefill
    return Programs(drafter.num_nodes, drafter.num_calls, prefill, admit, chunk, halt)


def _empty(build: Callable[[SpecParams], Slots], meshes: tuple[Mesh, Mesh]) -> Callable[[SpecParams], Slots]:
    """params, each on its mesh -> empty slots, of which only the parameters' shapes are known to one program."""
    there, here = _movers(meshes)

    def empty(params: SpecParams) -> Slots:
        shapes = jax.eval_shape(lambda own: own, params)
        text, half = _parted(jax.jit(lambda: build(shapes))())
        return _whole(there(text), here(half))

    return empty


def _movers(meshes: tuple[Mesh, Mesh]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Trees with rows first -> the same on the target's mesh, and on the drafter's."""
    wide, narrow = meshes
    return (lambda tree: moved(tree, wide, "target")), (lambda tree: moved(tree, narrow, "drafter"))


def _parted(slots: Slots) -> tuple[SpecState, tuple]:
    """Slots by mesh: texts with the target's state, and the drafter's with history and record."""
    return slots.spec._replace(drafter=()), (slots.spec.drafter, slots.history, slots.record)


def _whole(text: SpecState, half: tuple) -> Slots:
    own, history, record = half
    return Slots(text._replace(drafter=own), history, record)
