"""Slots and the jitted programs that fill, decode and free them; one state, whose leaves all have slots first.

`prefill` reads prompts of one bucket with the target and pools the router's features; `admit` reads them with the drafter
and puts the rows into free slots; `chunk` repeats the step on the device until enough rows are done; `halt` ends rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.metrics import History, no_history, remember
from jaxspec.recording import NOTHING, Recorder
from jaxspec.speculate import run, speculator
from jaxspec.types import ONE_DEVICE, Drafter, Placement, Prompt, Rule, Sampling, SpecParams, SpecState, Target


class Slots(NamedTuple):
    """The engine's whole state, every leaf with slots first: rows being decoded, their rounds and their record."""

    spec: SpecState
    history: History
    record: Any


class Programs(NamedTuple):
    """The jitted programs of one way of decoding, see `Drafter` for its numbers; nothing is compiled before it is called.

    prefill: (target params, tokens `[R, P]`, length `[R]`) -> (target state, features `[R, H]`, what the drafter `sees`).
    admit: (params, slots, prompt, target state, sampling, where `[R]`) -> slots; a row whose `where` is B is dropped.
    chunk: (params, slots, floor, rounds) -> slots, after `rounds` rounds or with no more than `floor` rows running.
    halt: (slots, ended `[B]`) -> slots, the rows that the host ended done.
    """

    num_nodes: int
    num_calls: int
    prefill: Callable
    admit: Callable
    chunk: Callable
    halt: Callable


def programs(
    target: Target,
    drafter: Drafter,
    rule: Rule,
    *,
    stop_tokens: Sequence[int],
    recorder: Recorder = NOTHING,
    placement: Placement = ONE_DEVICE,
) -> Programs:
    """Composes the programs of a target, a drafter and an acceptance rule."""
    spec = speculator(target, drafter, rule, stop_tokens=stop_tokens)

    def prefill(params, tokens: Array, length: Array):
        rows, bucket = tokens.shape
        none = jnp.zeros(rows, jnp.int32)
        prompt = Prompt(tokens, length, jax.random.split(jax.random.key(0), rows), none, none, none)
        state, features = target.init(params, prompt, bucket)
        return state, pool_features(features, length), drafter.sees(features)

    def admit(params: SpecParams, slots: Slots, prompt: Prompt, target_state, sampling, where: Array) -> Slots:
        rows = fresh(spec, recorder, params, prompt, target_state, sampling)
        return placement.state(insert(slots, rows, where))

    def chunk(params: SpecParams, slots: Slots, floor: Array, rounds: Array) -> Slots:
        fold = lambda stats, info: (remember(stats[0], info), recorder.fold(stats[1], info), stats[2] + 1)
        go_on = lambda state, stats: (jnp.sum(~state.done) > floor) & (stats[2] < rounds)
        start = (slots.history, slots.record, jnp.int32(0))
        state, (history, record, _) = run(spec.step, fold, params, slots.spec, start, go_on)
        return placement.state(Slots(state, history, record))

    def halt(slots: Slots, ended: Array) -> Slots:
        return placement.state(slots._replace(spec=slots.spec._replace(done=slots.spec.done | ended)))

    jitted = (jax.jit(f, donate_argnums=at) for f, at in ((prefill, ()), (admit, 1), (chunk, 1), (halt, 0)))
    return Programs(drafter.num_nodes, drafter.num_calls, *jitted)


def empty_slots(
    target: Target,
    drafter: Drafter,
    rule: Rule,
    *,
    slots: int,
    room: int,
    sampled: bool,
    recorder: Recorder = NOTHING,
    placement: Placement = ONE_DEVICE,
) -> Callable[[SpecParams], Slots]:
    """params -> B slots of nothing, all done, with `room` tokens of cache for each; to be jitted, which puts them in place."""
    spec = speculator(target, drafter, rule, stop_tokens=())

    def build(params: SpecParams) -> Slots:
        zero = jnp.zeros(slots, jnp.int32)
        sampling = Sampling(jnp.zeros(slots), zero + 1, jnp.ones(slots)) if sampled else None
        keys = jax.random.split(jax.random.key(0), slots)
        prompt = Prompt(jnp.zeros((slots, room), jnp.int32), zero + 1, keys, zero, zero, zero - 1)
        state, features = target.init(params.target, prompt, room)
        prompt = prompt._replace(features=drafter.sees(features))
        return fresh(spec, recorder, params, prompt, state, sampling)

    def empty(params: SpecParams) -> Slots:
        blank_keys = lambda leaf: jax.random.split(jax.random.key(0), leaf.shape[0])
        zeros = lambda leaf: blank_keys(leaf) if _is_key(leaf) else jnp.zeros(leaf.shape, leaf.dtype)
        blank = jax.tree.map(zeros, jax.eval_shape(build, params))
        nobody = blank.spec._replace(done=jnp.ones(slots, bool), length=jnp.ones(slots, jnp.int32))
        return placement.state(blank._replace(spec=nobody))

    return empty


def insert(slots: Any, rows: Any, where: Array) -> Any:
    """Puts row i, of all leaves or some, into slot `where[i]`; leaves of a shorter room fill the beginning of the slot's."""

    def put(leaf: Array, new: Array) -> Array:
        start = (slice(0, n) for n in new.shape[1:])
        return leaf.at[(where, *start)].set(new.astype(leaf.dtype), mode="drop")

    return jax.tree.map(put, slots, rows)


def pool_features(hidden: Array, length: Array) -> Array:
    """Mean over the real tokens, normalised to unit length: `[B, P, H]` -> `[B, H]` float32."""
    real = (jnp.arange(hidden.shape[1]) < length[:, None])[..., None]
    mean = jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0.0), axis=1) / length[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


def fresh(spec, recorder: Recorder, params: SpecParams, prompt: Prompt, target_state, sampling) -> Slots:
    """Rows that have read their prompts and emitted nothing."""
    rows, bucket = prompt.tokens.shape
    state = spec.init(params, prompt, target_state, sampling, bucket)
    return Slots(state, no_history(rows, bucket), recorder.init(prompt))


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
