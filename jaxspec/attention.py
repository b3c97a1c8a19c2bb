"""Attention of a window to a cache: of all its slots, masked, or on a GPU of those alone that hold tokens.

Source of the second: the softmax in pieces of FlashAttention-2, https://arxiv.org/abs/2307.08691, and pieces of a row
side by side as in Flash-Decoding, https://pytorch.org/blog/flash-decoding.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NEVER = -1e9  # a logit whose probability is exactly zero in float32, yet zero times it is not NaN
PIECE = 64  # slots that a program of the kernel reads at once
SIDES = 4  # programs that share a row's slots
ROWS = 16  # least rows of a product on tensor cores
WIDEST = 32  # columns of a window beyond which the kernel is not for it

Attend = Callable[[Array, Array, Array, Array, Array, int | None], Array]
"""(q `[B, T, heads, D]`, keys and values `[B, kv heads, S, D]`, mask `[B, T, S]`, start `[B]`, window) -> `[B, T, heads, D]`.

Column t of a chain sees slots up to `start + t`, of which a sliding `window` keeps the last; the mask says the same.
"""


def dense(q: Array, keys: Array, values: Array, mask: Array, start: Array, window: int | None) -> Array:
    """Attention to all slots under the mask, softmax in float32.

    The library's takes keys as `[B, S, kv heads, D]`, which XLA transposes as a whole in every round.
    """
    del start, window
    batch, width, _, dim = q.shape
    if batch == width == 1:
        return _of_one(q, keys, values, mask)
    groups = jnp.moveaxis(q.reshape(batch, width, keys.shape[1], -1, dim), 1, 3)
    rows = groups.reshape(batch, keys.shape[1], -1, dim)
    # A head's queries and columns are one axis: with two XLA would transpose all values, and the scores twice.
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(*groups.shape[:-1], -1) / math.sqrt(dim)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEVER), axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bkrs,bksd->bkrd", weights.reshape(*rows.shape[:-1], -1), values.astype(q.dtype))
    return jnp.moveaxis(mixed.reshape(groups.shape), 3, 1).reshape(q.shape)


def _of_one(q: Array, keys: Array, values: Array, mask: Array) -> Array:
    """What `dense` says for one column of one row, by sums.

    Where a product reads what so small a window was just written to, XLA on a CPU copies the cache four times for it.
    """
    wide = lambda x: x.astype(q.dtype).astype(jnp.float32)[:, :, None]
    queries = wide(q.reshape(1, keys.shape[1], -1, q.shape[-1]))[:, :, 0, :, None]
    scores = jnp.sum(queries * wide(keys), axis=-1) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, NEVER), axis=-1).astype(q.dtype)
    mixed = jnp.sum(weights.astype(jnp.float32)[..., None] * wide(values), axis=-2)
    return mixed.astype(q.dtype).reshape(q.shape)


def valid(
    q: Array, keys: Array, values: Array, mask: Array, start: Array, window: int | None, *, interpret: bool = False
) -> Array:
    """Attention of a chain to the slots that hold tokens, in one kernel; whatever lies behind them is not read.

    Wide windows, and heads whose size is no power of two, take `dense`.
    """
    (batch, width, heads, dim), kv = q.shape, keys.shape[1]
    if width > WIDEST or dim & (dim - 1):
        return dense(q, keys, values, mask, start, window)
    group = heads // kv
    part = jax.ShapeDtypeStruct((batch, SIDES, width, kv, group, dim), jnp.float32)
    kernel = partial(_piece, window=window)
    call = pl.pallas_call(
        kernel,
        out_shape=(part, jax.ShapeDtypeStruct(part.shape[:-1], jnp.float32)),
        grid=(batch, kv, SIDES),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
    )
    own, mass = call(q.reshape(batch, width, kv, group, dim), keys, values, start)
    share = jax.nn.softmax(mass, axis=1)
    return jnp.einsum("bswkgd,bswkg->bwkgd", own, share).reshape(q.shape).astype(q.dtype)


def fastest(parallel: bool, dtype) -> Attend:
    """The better of the two for this process: the kernel where one GPU holds all that it reads, in 16 bits."""
    alone = jax.default_backend() == "gpu" and not parallel
    return valid if alone and jnp.dtype(dtype).itemsize == 2 else dense


def _piece(q_ref, keys_ref, values_ref, start_ref, out_ref, mass_ref, *, window: int | None) -> None:
    """A side's part of the attention of one kv head's queries: its softmax-weighted values, and the log of its mass."""
    row, head, side = (pl.program_id(axis) for axis in range(3))
    width, group, dim = q_ref.shape[1], q_ref.shape[3], q_ref.shape[4]
    groups = pl.next_power_of_2(group)
    columns = max(pl.next_power_of_2(width), ROWS // groups)
    rows = columns * groups
    start, scale = start_ref[row], math.log2(math.e) / math.sqrt(dim)
    real = (jnp.arange(columns) < width)[:, None] & (jnp.arange(groups) < group)[None]
    everywhere = jnp.broadcast_to(real[:, :, None], (columns, groups, dim))
    first = (
        row - row
    )  # zero, but not to the tracer: a slice of static bounds may not reach past its array, mask or no mask
    at = (row, pl.ds(first, columns), head, pl.ds(first, groups))
    q = triton.load(q_ref.at[(*at, slice(None))], mask=everywhere, other=0.0).reshape(rows, dim)
    position = start + jax.lax.broadcasted_iota(jnp.int32, (columns, groups), 0).reshape(rows)
    end = jnp.minimum(start + width, keys_ref.shape[2])

    def read(i, carry):
        out, most, mass = carry
        slot = (i * SIDES + side) * PIECE
        slots = slot + jnp.arange(PIECE)
        there = jnp.broadcast_to((slots < end)[:, None], (PIECE, dim))
        load = lambda ref: triton.load(ref.at[row, head, pl.ds(slot, PIECE), slice(None)], mask=there, other=0.0)
        seen = slots[None] <= position[:, None]
        if window is not None:
            seen &= slots[None] > position[:, None] - window
        scores = jnp.where(seen, triton.dot(q, load(keys_ref).astype(q.dtype).T) * scale, NEVER)
        higher = jnp.maximum(most, scores.max(1))
        weights = jnp.where(seen, jnp.exp2(scores - higher[:, None]), 0.0)
        fade = jnp.exp2(most - higher)
        own = triton.dot(weights.astype(q.dtype), load(values_ref).astype(q.dtype))
        return out * fade[:, None] + own, higher, mass * fade + weights.sum(1)

    nothing = jnp.zeros((rows, dim), jnp.float32), jnp.full(rows, NEVER, jnp.float32), jnp.zeros(rows, jnp.float32)
    pieces = pl.cdiv(end, PIECE)
    out, most, mass = jax.lax.fori_loop(0, pl.cdiv(pieces - side, SIDES), read, nothing)
    out = out / jnp.maximum(mass, 1e-30)[:, None]
    log_mass = jnp.where(mass > 0, most / math.log2(math.e) + jnp.log(jnp.maximum(mass, 1e-30)), NEVER)
    at = (row, side, pl.ds(first, columns), head, pl.ds(first, groups))
    triton.store(out_ref.at[(*at, slice(None))], out.reshape(columns, groups, dim), mask=everywhere)
    triton.store(mass_ref.at[at], log_mass.reshape(columns, groups), mask=real)
