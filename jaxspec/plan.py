"""Memory before it is allocated: what weights, state and workspace take on each device, by abstract evaluation alone."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxspec import recording, sharding, verify
from jaxspec.adapters import Whole, init_bank
from jaxspec.config import UserError
from jaxspec.drafters.lm import LMDrafterParams, lm_drafter
from jaxspec.requests import bucket_of, room_of
from jaxspec.slots import Slots, empty_slots
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, abstract
from jaxspec.types import SpecParams

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be decoded.

    batch: rows decoded together, on all devices; prefill_rows: rows read at a time, None for all of them;
    logprobs: whether log probabilities are recorded.
    prompt_tokens, max_new_tokens: longest prompt and completion.
    tasks, rank: of the bank, 0 tasks for none, rank 0 for whole specialists; drafters: whole drafters in memory beside it, the
    base with `mixed`, a trunk and merged specialists; drafter_caches: drafters that each keep a cache of every row.
    """

    batch: int
    prompt_tokens: int
    max_new_tokens: int
    num_speculative_tokens: int
    dtype: str = "bfloat16"
    tasks: int = 0
    rank: int = 0
    drafters: int = 1
    drafter_caches: int = 1
    prefill_rows: int | None = None
    logprobs: bool = False


class Row(NamedTuple):
    """A line of the plan: bytes on each device of a `kind`: weights, state, prefill or round (workspaces in turn)."""

    kind: str
    name: str
    bytes: int


def plan(target: LMConfig, draft: LMConfig, load: Load, mesh: Mesh | AbstractMesh) -> list[Row]:
    """The lines of the plan; a state is counted once, as programs that donate it need it.

    Workspaces are what XLA's own attention and the shipped rules hold at a time: two copies of attention's scores, and
    of `[B, W, V]` the logits, log p and the rule's law. A fused attention needs less.
    """
    prefill_rows = load.batch if load.prefill_rows is None else min(load.prefill_rows, load.batch)
    return [
        *_weights(target, draft, load, mesh),
        *_state(target, draft, load, load.batch, "state", mesh),
        *_state(target, draft, load, prefill_rows, "prefill", mesh)[:2],
        *_prefill(target, load, prefill_rows, mesh),
        *_round(target, load, mesh),
    ]


def total(rows: list[Row]) -> int:
    """Bytes on each device: weights, state and the larger workspace."""
    of = lambda kind: sum(row.bytes for row in rows if row.kind == kind)
    return of("weights") + of("state") + max(of("prefill"), of("round"))


def table(rows: list[Row]) -> str:
    """The plan as text, in GiB a device."""
    line = lambda kind, name, size: f"{kind:<8}  {name:<38}  {size / GIB:>8.3f}"
    end = line("total", "weights, state, the larger workspace", total(rows))
    return "\n".join([f"{'':<8}  {'':<38}  {'GiB':>8}", *(line(*row) for row in rows), end])


def largest_batch(target: LMConfig, draft: LMConfig, load: Load, mesh: Mesh | AbstractMesh, memory: int) -> int:
    """The largest batch that fits in `memory` bytes a device, a multiple of the mesh's data axis; 0 when none does."""
    along = sharding.num_row_parts(mesh)
    need = lambda parts: total(plan(target, draft, replace(load, batch=parts * along), mesh)) if parts else 0
    fits, too_many = 0, 1
    while need(too_many) <= memory:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if need(middle) <= memory else (fits, middle)
    return fits * along


def fit(
    target: LMConfig, draft: LMConfig, load: Load, mesh: Mesh | AbstractMesh, memory: int | None = None
) -> list[Row]:
    """The plan of a load that fits.

    Args:
        memory: bytes of a device; None when no limit is known.

    Raises:
        UserError: the mesh does not divide model or batch, or the load needs more than `memory`.
    """
    sharding.check(target, mesh, load.batch)
    sharding.check(draft, mesh, part="drafter")
    rows = plan(target, draft, load, mesh)
    if memory is None or total(rows) <= memory:
        return rows
    largest = largest_batch(target, draft, load, mesh, memory)
    remedy = f"the largest that fits is {largest}" if largest else "not one row fits, split over more devices"
    have, there = f"{total(rows) / GIB:.1f} GiB a device", f"{memory / GIB:.1f} GiB is there"
    raise UserError(f"a batch of {load.batch} needs {have}, {there}; {remedy}")


def device_memory() -> int | None:
    """Bytes that JAX may use on a device here; None where the platform does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def _weights(target: LMConfig, draft: LMConfig, load: Load, mesh) -> list[Row]:
    shapes = _params(target, draft, replace(load, batch=1))
    drafter = sharding.device_bytes(
        shapes.drafter.weights, sharding.param_specs(shapes.drafter.weights, "drafter"), mesh
    )
    rows = [
        Row("weights", "target", sharding.device_bytes(shapes.target, sharding.param_specs(shapes.target), mesh)),
        Row("weights", "base drafter", drafter),
        Row("weights", "mixed, trunk, merged drafters", (load.drafters - 1) * drafter),
    ]
    bank = shapes.drafter.bank
    size = 0 if bank is None else sharding.device_bytes(bank, sharding.param_specs(bank, "drafter"), mesh)
    kind = "LoRA bank" if load.rank else "whole specialists"
    return [*rows, Row("weights", f"{kind}, {load.tasks} tasks", size)]


def _state(target: LMConfig, draft: LMConfig, load: Load, batch: int, kind: str, mesh) -> list[Row]:
    one = _one_slot(target, draft, replace(load, batch=1))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), one)
    specs = sharding.row_specs(state)._replace(spec=sharding.state_specs(state.spec))
    drafter, own = state.spec.drafter, specs.spec.drafter
    rest, rest_specs = (tree._replace(spec=tree.spec._replace(target=(), drafter=())) for tree in (state, specs))
    return [
        Row(kind, "target cache", sharding.device_bytes(state.spec.target, specs.spec.target, mesh)),
        Row(
            kind,
            "drafter cache",
            load.drafter_caches
            * sharding.device_bytes(drafter._replace(adapter=None), own._replace(adapter=None), mesh),
        ),
        Row(kind, "rows' own adapters", sharding.device_bytes(drafter.adapter, own.adapter, mesh)),
        Row(kind, "tokens, rounds and records", sharding.device_bytes(rest, rest_specs, mesh)),
    ]


def _prefill(target: LMConfig, load: Load, rows: int, mesh) -> list[Row]:
    bucket, _ = _buffers(load)
    wide = _array_bytes(mesh, load.dtype, (rows, "rows"), (bucket, None), (target.mlp_width, "mlp"))
    thin = _array_bytes(mesh, load.dtype, (rows, "rows"), (bucket, None), (target.width, "width"))
    return [
        Row("prefill", "attention scores [B, heads, P, L] x 2", 2 * _scores(target, load, rows, bucket, mesh)),
        Row("prefill", "gate, up, hidden [B, P, H]", 2 * wide + thin),
    ]


def _round(target: LMConfig, load: Load, mesh) -> list[Row]:
    drafted = load.num_speculative_tokens
    of = lambda width: _array_bytes(mesh, "float32", (load.batch, "rows"), (width, None), (target.vocab_size, None))
    return [
        Row("round", "attention scores [B, heads, W, L] x 2", 2 * _scores(target, load, load.batch, drafted + 1, mesh)),
        Row("round", "logits, log p, law [B, W, V]", 3 * of(drafted + 1)),
        Row("round", "log q [B, K, V]", of(drafted)),
    ]


@lru_cache(maxsize=32)
def _one_slot(target: LMConfig, draft: LMConfig, load: Load) -> Slots:
    """Shapes of one slot, sampling with top-k and top-p; every leaf has slots first, so more of them are as simple."""
    dtype = jnp.dtype(load.dtype)
    drafter = lm_drafter(draft, load.num_speculative_tokens, vocab_size=target.vocab_size, dtype=dtype)
    _, room = _buffers(load)
    recorder = recording.logprobs(room) if load.logprobs else recording.NOTHING
    shape = {"slots": 1, "room": room, "sampled": True, "recorder": recorder}
    return jax.eval_shape(
        empty_slots(lm_target(target, dtype), drafter, verify.rejection, **shape), _params(target, draft, load)
    )


@lru_cache(maxsize=32)
def _params(target: LMConfig, draft: LMConfig, load: Load) -> SpecParams:
    dtype = jnp.dtype(load.dtype)
    weights = abstract(draft, dtype)
    of_shape = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    bank = None
    if load.tasks and load.rank:
        fresh = lambda own: init_bank(own, jax.random.key(0), tasks=load.tasks, rank=load.rank)
        bank = jax.tree.map(lambda x: of_shape(*x.shape), jax.eval_shape(fresh, weights))
    elif load.tasks:
        bank = Whole(jax.tree.map(lambda x: of_shape(load.tasks + 1, *x.shape), weights))
    return SpecParams(abstract(target, dtype), LMDrafterParams(weights, bank))


def _buffers(load: Load) -> tuple[int, int]:
    bucket = bucket_of(load.prompt_tokens)
    return bucket, room_of(bucket, load.max_new_tokens, load.num_speculative_tokens)


def _scores(config: LMConfig, load: Load, rows: int, queries: int, mesh) -> int:
    _, slots = _buffers(load)
    return _array_bytes(mesh, "float32", (rows, "rows"), (config.num_heads, "heads"), (queries, None), (slots, None))


def _array_bytes(mesh, dtype: str, *axes: tuple[int, str | None]) -> int:
    sizes, names = zip(*axes)
    leaf = jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
    return sharding.device_bytes(leaf, sharding.spec(*names, part="target"), mesh)
