"""What `decode.growth` measures along each axis: values, and of every value the program whose step is timed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from decode.chains import Chain, iterations, reading
from decode.subjects import Load, Measured, Models, Subject, alone, banked, drawn
from jaxspec.config import UserError
from jaxspec.requests import BUCKETS, MAX_DRAFT, bucket_of

SPARE = 384  # slots of a row's cache beyond what it holds, for the rounds of a chain

Axis = Literal["context", "tasks", "drafted", "vocabulary", "prefill", "compile"]


@dataclass(frozen=True, kw_only=True)
class Growth(Measured):
    """What is measured: a base point, and the values of each axis, of which one at a time is changed."""

    axes: tuple[Axis, ...] = ()
    """Axes to measure; none means all, without `compile` for shapes, as a router and what it chooses among are a pool's."""
    slots: int = 8
    """Rows decoded together; prompts are read one at a time."""
    cached: int = 128
    """Tokens cached in every row where `context` is not what changes."""
    rank: int = 16
    """Rank of the adapters, which are fresh ones."""
    longest: int = 8192
    """Most tokens of a context or prompt; longer values are left out."""
    context: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Tokens cached in every row."""
    tasks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Tasks in the bank; the rows have one after the other."""
    drafted: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 16)
    """Tokens drafted an iteration."""
    vocabulary: tuple[int, ...] = (8192, 16_384, 32_768, 65_536, 131_072)
    """Rows of both models' vocabularies, with random weights."""
    prefill: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Tokens of the prompt; each is one of the sizes that prompts are padded to."""


def axes_of(config: Growth) -> tuple[str, ...]:
    """The axes asked for, `compile` first: its processes need the device to themselves.

    Raises:
        UserError: `compile` without a pool, a number drafted or a prompt's size that no program has, no value left.
    """
    wanted = config.axes or (*PROGRAMS, *(("compile",) if config.pool else ()))
    if "compile" in wanted and not config.pool:
        raise UserError("--axes compile needs --pool: shapes have no router and no bank; leave it out")
    if most := [k for k in config.drafted if k > MAX_DRAFT]:
        raise UserError(f"--drafted {most[0]} is out of range; give numbers from 0 to {MAX_DRAFT}")
    if odd := [size for size in config.prefill if size not in BUCKETS]:
        raise UserError(f"--prefill {odd[0]} is no size that prompts are padded to; give some of {BUCKETS}")
    for axis in wanted:
        if axis != "compile" and not values(config, axis):
            raise UserError(
                f"--longest {config.longest} leaves no value of --{axis}; give at least {min(getattr(config, axis))}"
            )
    return tuple(sorted(set(wanted), key=("compile", *PROGRAMS).index))


def values(config: Growth, axis: str) -> list[int]:
    """An axis's values, ascending."""
    own = sorted(set(getattr(config, axis)))
    return [value for value in own if value <= config.longest] if axis in ("context", "prefill") else own


def points(config: Growth, models: Models, number: int, axis: str) -> Iterator[tuple[int, Chain]]:
    """Each value of an axis with its program, made when it is asked for; `number` tokens are drafted."""
    for value in values(config, axis):
        yield value, PROGRAMS[axis](config, models, number, value)


def _at_context(config: Growth, models: Models, number: int, value: int) -> Chain:
    return _iteration(alone(models, config.slots), _load(value, number))


def _at_tasks(config: Growth, models: Models, number: int, value: int) -> Chain:
    return _iteration(banked(models, config.slots, value, config.rank), _load(config.cached, number))


def _at_drafted(config: Growth, models: Models, number: int, value: int) -> Chain:
    return _iteration(alone(models, config.slots), _load(config.cached, value))


def _at_vocabulary(config: Growth, models: Models, number: int, value: int) -> Chain:
    target, draft = (replace(own, vocab_size=value, live_vocab=None) for own in (models.shape, models.draft))
    return _iteration(alone(drawn(target, draft, models.dtype), config.slots), _load(config.cached, number))


def _at_prefill(config: Growth, models: Models, number: int, value: int) -> Chain:
    return reading(alone(models, 1), _load(value, number))


PROGRAMS: dict[str, Callable[[Growth, Models, int, int], Chain]] = {
    "context": _at_context,
    "tasks": _at_tasks,
    "drafted": _at_drafted,
    "vocabulary": _at_vocabulary,
    "prefill": _at_prefill,
}


def _load(context: int, number: int) -> Load:
    bucket = bucket_of(context)
    return Load(context, max(bucket, context + SPARE), number, bucket)


def _iteration(own: Subject, load: Load) -> Chain:
    (drafting,) = own.drafters.values()
    return iterations(own, drafting if load.number else None, load)
