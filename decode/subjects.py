"""What `decode.roofline` measures: a pool's models as its engines hold them, or shapes with random weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decode.plan import shape_of
from jaxspec import prepared, roofline
from jaxspec.adapters import init_bank
from jaxspec.config import UserError
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.requests import MAX_DRAFT, bucket_of
from jaxspec.store.facts import draft_length
from jaxspec.store.loading import load_pool
from jaxspec.store.pool import Pool
from jaxspec.timing import MORE
from jaxspec.transformer import LMConfig, abstract


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Models whose programs are measured, and how long."""

    pool: str = ""
    """Folder of the pool whose programs are measured."""
    shapes: tuple[str, ...] = ()
    """In place of a pool a target and a drafter with random weights: published models by name, or model folders."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """float32 or bfloat16; empty is what the pool was made with, and bfloat16 for shapes."""
    num_speculative_tokens: int | None = None
    """Tokens drafted an iteration; None is what calibration chose, and 4 for shapes."""
    bandwidth: float | None = None
    """Bytes per second of the device's memory; None measures it."""
    peak: float | None = None
    """Operations per second of the device; None measures a large product."""
    passes: int = 7
    """Times that every program is measured, of which the median counts."""
    seconds: float = 0.15
    """What the shorter of a program's two chains should take; the other is three times as long."""
    output: str = ""
    """File for the JSON."""


@dataclass(frozen=True, kw_only=True)
class Roofline(Measured):
    """What is measured, and how."""

    slots: tuple[int, ...] = (1, 8)
    """Numbers of rows decoded together."""
    context: int = 128
    """Tokens cached in every row."""
    room: int = 512
    """Slots of the cache of every row."""
    prompt: int = 128
    """Tokens of the prompt whose reading is measured, padded to their bucket."""
    widths: tuple[int, ...] = (2, 3, 5, 9)
    """Columns of the windows that the target verifies, beside one, what idles, and what an iteration needs."""


class Load(NamedTuple):
    """Tokens: cached in every row, slots of the cache, drafted a round, and of the prompt that is read."""

    context: int
    room: int
    number: int
    bucket: int

    @property
    def budget(self) -> int:
        """Tokens that a row has room to emit."""
        return self.room - self.context - MAX_DRAFT - 1


class Drafting(NamedTuple):
    """Who drafts: parameters, the slots' routes, and the bytes that more than one route adds to a call."""

    params: LMDrafterParams
    routes: tuple[int, ...]
    adapters: int = 0


class Subject(NamedTuple):
    """What is measured in so many slots.

    target, read: the target's weights, as windows want them and as prompts do; drafters: by name, the first the plainest.
    """

    shape: LMConfig
    draft: LMConfig
    dtype: Any
    slots: int
    target: dict
    read: dict
    drafters: dict[str, Drafting]


def subjects(config: Roofline) -> tuple[Load, Iterator[Subject]]:
    """The load, and a subject for every number of slots.

    Raises:
        UserError: not exactly one of pool and shapes, shapes that are unknown or no pair, no room for context and windows.
    """
    check_models(config)
    if config.pool:
        pool = load_pool(config.pool, target=config.target, draft=config.draft, dtype=config.dtype)
        load = _load(config, number_of(config, pool.facts))
        return load, (_of_pool(pool, slots) for slots in config.slots)
    return _load(config, number_of(config, {})), _of_shapes(config)


def check_models(config: Measured) -> None:
    """Raises UserError unless there is either a pool or two shapes."""
    if bool(config.pool) == bool(config.shapes):
        raise UserError(f"--pool {config.pool!r} with --shapes {config.shapes}; give either a pool or two shapes")
    if config.shapes and len(config.shapes) != 2:
        raise UserError(f"--shapes {' '.join(config.shapes)} must be two, a target and a drafter")


def number_of(config: Measured, facts: dict[str, Any]) -> int:
    """Tokens drafted an iteration, of a pool of which so much is known or of shapes."""
    known = 4 if config.shapes and config.num_speculative_tokens is None else config.num_speculative_tokens
    return draft_length(facts, known, least=1)


class Models(NamedTuple):
    """A target and a drafter: shapes, and weights as prompts want them."""

    shape: LMConfig
    draft: LMConfig
    target: dict
    drafter: dict

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self.target)[0].dtype


def models_of(config: Measured, pool: Pool | None = None) -> Models:
    """The pool's target and what its adapters belong on; without a pool the shapes with random weights."""
    if pool:
        pair = pool.pair
        return Models(pair.target.config, pair.draft.config, pair.target.params, pool.trunk)
    target, draft = (shape_of(name) for name in config.shapes)
    return drawn(target, draft, jnp.dtype(config.dtype or "bfloat16"))


def drawn(target: LMConfig, draft: LMConfig, dtype: Any) -> Models:
    """Random weights."""
    return Models(target, draft, _drawn(target, dtype), _drawn(draft, dtype))


def alone(models: Models, slots: int) -> Subject:
    """A target with one drafter for all rows."""
    drafter = Drafting(LMDrafterParams(prepared.laid(models.drafter, slots)), (-1,) * slots)
    return _subject(models, slots, {"base": drafter})


def banked(models: Models, slots: int, tasks: int, rank: int) -> Subject:
    """A target with fresh adapters of so many tasks, of which rows have one after the other."""
    bank = init_bank(models.drafter, jax.random.key(0), tasks=tasks, rank=rank)
    routes = tuple(i % tasks for i in range(slots))
    return _subject(
        models, slots, _of_routes(models.draft, prepared.banked(models.draft, models.drafter, bank, slots), routes)
    )


def _of_routes(draft: LMConfig, params: LMDrafterParams, routes: tuple[int, ...]) -> dict[str, Drafting]:
    number, dtype = len(set(routes)), jax.tree.leaves(params.weights)[0].dtype
    return {f"{number} routes": Drafting(params, routes, roofline.updates(draft, dtype, params.bank, number))}


def _subject(models: Models, slots: int, drafters: dict[str, Drafting]) -> Subject:
    laid = prepared.laid(models.target, slots)
    return Subject(models.shape, models.draft, models.dtype, slots, laid, models.target, drafters)


def _load(config: Roofline, number: int) -> Load:
    load = Load(config.context, config.room, number, bucket_of(config.prompt))
    iterations = load.context + MORE * (number + 1) + MAX_DRAFT + 1
    least = max(bucket_of(load.context), iterations, load.context + max(config.widths))
    if load.room < least:
        raise UserError(
            f"--room {load.room} does not hold {load.context} cached tokens and the windows behind them; give at least {least}"
        )
    return load


def _of_pool(pool: Pool, slots: int) -> Subject:
    pair = pool.pair
    plain = pair.target.params
    dtype = jax.tree.leaves(plain)[0].dtype
    own = (pair.target.config, pair.draft.config, dtype, slots, prepared.laid(plain, slots), plain)
    alone = lambda weights, route: Drafting(LMDrafterParams(prepared.laid(weights, slots)), (route,) * slots)
    if slots == 1:
        return Subject(*own, {"base": alone(pool.drafter("base"), -1), "merged": alone(pool.weights(0), 0)})
    routes = tuple(i % len(pool.tasks) for i in range(slots))
    mixed = _of_routes(pair.draft.config, prepared.adapted(pool, slots)(np.array(routes)), routes)
    return Subject(*own, {"one merged": alone(pool.weights(0), 0), **mixed})


def _of_shapes(config: Roofline) -> Iterator[Subject]:
    models = models_of(config)
    for slots in config.slots:
        yield alone(models, slots)


def _drawn(config: LMConfig, dtype: Any) -> dict:
    """Random weights, leaf by leaf: one program a shape, where `transformer.init` would be one of all leaves."""
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    shapes, treedef = jax.tree.flatten(abstract(config, dtype))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return treedef.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, shapes, strict=True)])
