"""What else is gathered of every round, on the device, indexed by output position."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.types import Prompt, SpecInfo


class Recorder(NamedTuple):
    """What else is gathered of every round.

    init: (prompt) -> record, rows first.
    fold: (record, info) -> record.
    """

    init: Callable[[Prompt], Any]
    fold: Callable[[Any, SpecInfo], Any]


NOTHING = Recorder(lambda prompt: (), lambda record, info: record)


def together(*recorders: Recorder) -> Recorder:
    """Records what each of them does, as a tuple."""

    def fold(record: tuple, info: SpecInfo) -> tuple:
        return tuple(own.fold(part, info) for own, part in zip(recorders, record, strict=True))

    return Recorder(lambda prompt: tuple(own.init(prompt) for own in recorders), fold)


class LogProbs(NamedTuple):
    """The target's log probability of every emitted token, in nats.

    origin: `[B]` the prompt's length, where output begins.
    raw: `[B, room]` at temperature 1, before top-k and top-p.
    sampled: `[B, room]` under the distribution that the token was drawn from; 0 where that is greedy.
    """

    origin: Array
    raw: Array
    sampled: Array


def logprobs(room: int) -> Recorder:
    """Records `LogProbs` of the first `room` tokens of every row."""

    def init(prompt: Prompt) -> LogProbs:
        zeros = jnp.zeros((prompt.length.shape[0], room), jnp.float32)
        return LogProbs(jnp.asarray(prompt.length), zeros, zeros)

    def fold(record: LogProbs, info: SpecInfo) -> LogProbs:
        verdict, offset = info.verdict, info.start - record.origin
        row = jnp.arange(verdict.tokens.shape[0])[:, None]
        emitted = lambda scores: scores[row, verdict.path, verdict.tokens]
        mass = jax.nn.logsumexp(info.scores.logits, axis=-1)[row, verdict.path]
        real = jnp.arange(verdict.tokens.shape[1]) < verdict.num_emitted[:, None]
        return LogProbs(
            record.origin,
            place(record.raw, emitted(info.scores.logits) - mass, offset, real),
            place(record.sampled, emitted(info.scores.log_p), offset, real),
        )

    return Recorder(init, fold)


class Choices(NamedTuple):
    """Who drafted, where a row's drafter changes, see `jaxspec.drafters.hedge`.

    rounds: `[B, D]` rounds that each of the drafters drafted.
    log_weights: `[B, D]` what the row trusted them with in its last round, natural logarithms.
    """

    rounds: Array
    log_weights: Array


def choices(num_drafters: int) -> Recorder:
    """Records `Choices` among so many drafters."""

    def init(prompt: Prompt) -> Choices:
        rows = prompt.length.shape[0]
        return Choices(jnp.zeros((rows, num_drafters), jnp.int32), jnp.zeros((rows, num_drafters), jnp.float32))

    def fold(record: Choices, info: SpecInfo) -> Choices:
        alive = (info.verdict.num_emitted > 0)[:, None]
        own = jax.nn.one_hot(info.drafter.choice, num_drafters, dtype=jnp.int32)
        log_weights = jnp.where(alive, info.drafter.log_weights, record.log_weights)
        return Choices(record.rounds + own * alive, log_weights)

    return Recorder(init, fold)


def place(buffer: Array, value: Array, offset: Array, real: Array) -> Array:
    """Writes `value [B, W, ...]` where `real [B, W]` into `buffer [B, room, ...]` from `offset [B]` on, up to its room."""
    room = buffer.shape[1]
    index = jnp.where(real, offset[:, None] + jnp.arange(value.shape[1]), room)
    put = lambda row, at, new: row.at[at].set(new, mode="drop")
    return jax.vmap(put)(buffer, index, value)
