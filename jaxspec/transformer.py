"""Decoder-only language models and their rewindable cache.

The modules are Flax NNX and define parameters and forward pass; what leaves this file are pure functions over plain
dicts of arrays: `forward` for whole sequences, `extend` for a window behind a cache, `unembed` for logits.
Architectures: Llama 2 and 3, Mistral, Qwen2, Qwen3, which differ in `LMConfig` and nowhere else.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxspec.adapters import Adapter, by_route, for_layer, low_rank
from jaxspec.attention import NEVER, Attend, dense

PIECE = 512  # longer prompts are read piece by piece, so that attention's workspace does not grow with them
COLUMNS = 16  # of a block, see `lay_out`: of 16, 32, 64 and 128 the best for windows of 2 to 5 rows
NARROW = 32  # most rows for which blocks beat one product with the whole kernel


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base frequency and, for longer contexts, how frequencies are scaled."""

    theta: float = 10_000.0
    kind: str = "default"  # default, linear or llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Shape of a decoder-only language model.

    windows: each layer's attention window, None for all.
    live_width, live_vocab: columns of the residual and rows of the vocabulary past which there is only padding, None where
    there is none, see `widening`; logits of padding are NEVER.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    live_width: int | None = None
    live_vocab: int | None = None

    @property
    def feature_width(self) -> int:
        """Columns of the last hidden states that are features."""
        return self.live_width or self.width

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


class Cache(NamedTuple):
    """Keys and values of every layer, each `[B, kv heads, S, head_dim]`; a slot's index is its token's position."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]


def init(config: LMConfig, key: Array, dtype=jnp.float32) -> dict:
    """Draws fresh parameters (normal, standard deviation 0.02, residual outputs scaled by depth); consumes `key`."""
    shapes = abstract(config, dtype)
    paths, treedef = jax.tree.flatten_with_path(shapes)
    residual = 0.02 / math.sqrt(2 * config.num_layers)

    def draw(i: int, path, leaf) -> Array:
        names = [str(getattr(p, "key", p)) for p in path]
        if names[-1] == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if names[-1] == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        scale = residual if names[-2] in ("o", "down") else 0.02
        return (scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)).astype(leaf.dtype)

    return treedef.unflatten([draw(i, path, leaf) for i, (path, leaf) in enumerate(paths)])


def abstract(config: LMConfig, dtype=jnp.float32) -> dict:
    """Shapes and types of the parameters, nothing allocated."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: _Decoder(config, nnx.Rngs(0)))))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def empty_cache(config: LMConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
    """A cache of `slots` positions for `batch` rows; what lies past a row's length is never read."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    return Cache(zeros(), zeros())


def compact(cache: Cache, start: Array, path: Array) -> Cache:
    """Moves the slots `start + path [B, T]` of each row to those right behind `start [B]`."""

    def gather(row, at, steps):
        return jax.lax.dynamic_update_slice(row, row[:, at + steps], (0, at, 0))

    return jax.tree.map(lambda leaf: jax.vmap(gather)(leaf, start, path), cache)


def forward(
    config: LMConfig, params: dict, tokens: Array, *, segments: Array | None = None, adapter: Adapter | None = None
) -> Array:
    """Last hidden states `[B, T, H]` of whole sequences `[B, T]`.

    Args:
        tokens: ids, or `[B, T, H]` what is read in place of their embeddings; so in `prefill` and `extend`.
        segments: `[B, T]` which document each token belongs to when several are packed in a row; positions restart
            with each and attention stays within. None: one document a row, and right padding is harmless.
        adapter: rows' own low-rank updates, or None.
    """
    batch, length = tokens.shape[:2]
    index = jnp.broadcast_to(jnp.arange(length), (batch, length))
    positions = index if segments is None else index - _segment_start(segments, index)
    causal = index[:, :, None] >= index[:, None, :]
    same = True if segments is None else segments[:, :, None] == segments[:, None, :]
    hidden, _ = _decoder(config, params)(tokens, positions, positions, causal & same, None, index[:, 0], adapter)
    return hidden


def prefill(
    config: LMConfig, params: dict, tokens: Array, length: Array, slots: int, dtype, adapter: Adapter | None = None
) -> tuple[Array, Cache]:
    """Reads right-padded prompts `[B, P]` of `length [B]`: hidden states `[B, P, H]` and a cache of `slots` positions.

    P is at most PIECE or a multiple of it; pieces in which no prompt has a token are not read.
    """
    batch, bucket = tokens.shape[:2]
    cache = empty_cache(config, batch, slots, dtype)
    if bucket <= PIECE:
        return extend(config, params, cache, tokens, jnp.zeros(batch, jnp.int32), adapter=adapter)

    def read(carry):
        at, hidden, cache = carry
        piece = jax.lax.dynamic_slice_in_dim(tokens, at, PIECE, axis=1)
        own, cache = extend(config, params, cache, piece, jnp.full(batch, at), adapter=adapter)
        return at + PIECE, jax.lax.dynamic_update_slice_in_dim(hidden, own, at, axis=1), cache

    start = (jnp.int32(0), jnp.zeros((batch, bucket, config.width), params["norm"]["scale"].dtype), cache)
    _, hidden, cache = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(length), read, start)
    return hidden, cache


def extend(
    config: LMConfig,
    params: dict,
    cache: Cache,
    tokens: Array,
    start: Array,
    *,
    depth: Array | None = None,
    visible: Array | None = None,
    origin: Array | None = None,
    adapter: Adapter | None = None,
    attend: Attend = dense,
) -> tuple[Array, Cache]:
    """Reads a window behind a cache: hidden states `[B, T, H]` and the cache with the window's slots written.

    Args:
        tokens: `[B, T]` the window.
        start: `[B]` tokens already cached; the window takes slots start..start+T-1, which must exist.
        depth: `[B, M]` position after `origin` of what stands in each of the M slots from there on; None for a chain.
        visible: `[B, T, M]` which of those slots each window row sees, beside all before them; None for a chain, which sees
            all up to itself.
        origin: `[B]` first of the M slots, which hold the window too; None is `start`, and M is T.
        adapter: rows' own low-rank updates, or None.
        attend: how a chain attends; what is no chain takes `dense`.
    """
    slot = jnp.arange(cache.slots)[None, None]
    if depth is None or visible is None:
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        mask = slot <= positions[:, :, None]
        key_positions = jnp.broadcast_to(slot[0], (tokens.shape[0], cache.slots))
    else:
        origin, number = start if origin is None else origin, visible.shape[2]
        positions = origin[:, None] + jax.vmap(_cut, (0, 0, None))(depth, start - origin, tokens.shape[1])
        begin = origin[:, None, None]
        inside = (slot >= begin) & (slot < begin + number)
        offset = jnp.clip(slot - begin, 0, number - 1)
        seen = jnp.take_along_axis(visible, jnp.broadcast_to(offset, (*tokens.shape[:2], cache.slots)), 2)
        mask = (slot < begin) | (inside & seen)
        own = origin[:, None] + jnp.take_along_axis(depth, offset[:, 0], 1)
        key_positions, attend = jnp.where(inside[:, 0], own, slot[0]), dense
    return _decoder(config, params, attend)(tokens, positions, key_positions, mask, cache, start, adapter)


def embed(params: dict, tokens: Array) -> Array:
    """Embeddings `[..., H]` of token ids."""
    return _look_up(params["embed"]["embedding"], tokens)


def unembed(config: LMConfig, params: dict, hidden: Array, vocab_size: int | None = None) -> Array:
    """Next-token logits `[..., V]`, float32; V is the model's vocabulary or `vocab_size`, where padding differs."""
    table = params["embed"]["embedding"] if config.tied else params["head"]["kernel"]
    if config.tied and table.ndim == 2:
        logits = jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)
    else:
        logits = product(hidden, table, config.vocab_size, jnp.float32)
    if config.live_vocab is not None:  # not cut, which would spare the products
        logits = jnp.where(jnp.arange(config.vocab_size) < config.live_vocab, logits, NEVER)
    missing = (vocab_size or config.vocab_size) - config.vocab_size
    if missing <= 0:
        return logits[..., :vocab_size]
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=NEVER)


def parts(config: LMConfig) -> dict[str, dict[str, int]]:
    """Products of a layer that read one input, by the name that they have together: each one's width."""
    q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    return {"qkv": {"q": q, "k": kv, "v": kv}, "gate_up": {"gate": config.mlp_width, "up": config.mlp_width}}


def lay_out(params: dict) -> dict:
    """The same model for windows of few rows on a CPU: kernels `[in, out]` as blocks of columns `[n, in, COLUMNS]`.

    There XLA copies a kernel as a whole before a product with 2 to 8 rows, which then costs two to three products with
    one row; a block is copied within the first cache. A tied embedding becomes the head that it is, `[n, H, COLUMNS]`.
    """
    embedding = params["embed"]["embedding"]
    placed = jax.tree.map_with_path(lambda path, leaf: blocks(leaf) if path[-1].key == "kernel" else leaf, params)
    return placed if "head" in params else placed | {"embed": {"embedding": blocks(embedding.T)}}


def least_columns(rows: int) -> int:
    """Columns of the cheapest window: on an accelerator a matrix by one vector takes longer than by two."""
    return 2 if rows == 1 and jax.default_backend() != "cpu" else 1


def rope_frequencies(rope: Rope, head_dim: int) -> Array:
    """Angles per position `[head_dim / 2]`, scaled as Llama 3 does where the config asks for it."""
    inverse = 1.0 / rope.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "default":
        return inverse
    if rope.kind == "linear":
        return inverse / rope.factor
    turns = rope.original_positions * inverse / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inverse / rope.factor + smooth * inverse


def blocks(kernel: Array) -> Array:
    """A kernel `[in, out]` as blocks of its columns, `[n, in, COLUMNS]`."""
    padded = jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % COLUMNS)))
    return jnp.moveaxis(padded.reshape(kernel.shape[0], -1, COLUMNS), 1, 0)


def product(x: Array, kernel: Array, width_out: int, dtype=None) -> Array:
    """x `[..., in]` by a kernel `[in, out]` or by its blocks of columns `[n, in, COLUMNS]`."""
    if kernel.ndim == 2:
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > NARROW:
        whole = jnp.moveaxis(kernel, 0, 1).reshape(kernel.shape[1], -1)
        return jnp.matmul(x, whole[:, :width_out], preferred_element_type=dtype)
    # Rows are repeated for each block: a product without batch axes would make XLA transpose the kernel.
    repeated = jnp.broadcast_to(rows, (len(kernel), *rows.shape))
    y = jnp.matmul(repeated, kernel, preferred_element_type=dtype)
    return jnp.moveaxis(y, 0, 1).reshape(*x.shape[:-1], -1)[..., :width_out]


def _cut(row: Array, at: Array, number: int) -> Array:
    return jax.lax.dynamic_slice(row, (at,), (number,))


def _look_up(table: Array, tokens: Array) -> Array:
    return table[tokens] if table.ndim == 2 else table[tokens // table.shape[-1], :, tokens % table.shape[-1]]


def _segment_start(segments: Array, index: Array) -> Array:
    first = jnp.concatenate([jnp.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(first == 1, index, 0), axis=1)


@lru_cache(maxsize=32)
def _graph(config: LMConfig, attend: Attend, joined: bool):
    return nnx.split(nnx.eval_shape(lambda: _Decoder(config, nnx.Rngs(0), attend, joined)))[0]


def _decoder(config: LMConfig, params: dict, attend: Attend = dense):
    joined = config.num_layers > 0 and "qkv" in params["layers"][0]["attention"]
    return nnx.merge(_graph(config, attend, joined), nnx.State(params))


def _rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    angle = positions[..., None, None] * frequencies
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _write(buffer: Array, new: Array, start: Array) -> Array:
    put = lambda row, value, at: jax.lax.dynamic_update_slice(row, value, (0, at, 0))
    new = jnp.swapaxes(new, 1, 2).astype(buffer.dtype)
    if buffer.shape[0] == 1:
        return jax.lax.dynamic_update_slice(buffer, new, (0, 0, start[0], 0))
    return jax.vmap(put)(buffer, new, start)


class _Norm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class _Dense(nnx.Module):
    def __init__(self, width_in: int, width_out: int, use_bias: bool):
        self.kernel = nnx.Param(jnp.zeros((width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out)) if use_bias else None
        self.width_out = width_out

    def __call__(self, x: Array, update: tuple[Array, Array] | Array | None = None) -> Array:
        kernel = self.kernel[...]
        if update is None or isinstance(update, tuple):
            y = product(x, kernel, self.width_out)
        else:
            y = by_route(x, kernel, update, self.width_out)
        if self.bias is not None:
            y = y + self.bias[...]
        return y + low_rank(x, update) if isinstance(update, tuple) else y


def _products(module: nnx.Module, name: str, config: LMConfig, use_bias: bool, joined: bool) -> None:
    """Gives a module the products of one of `parts`, or the one that they are together, see `joining`."""
    own = parts(config)[name]
    for part, width in ({name: sum(own.values())} if joined else own).items():
        setattr(module, part, _Dense(config.width, width, use_bias))


def _multiplied(module: nnx.Module, name: str, config: LMConfig, x: Array, adapter: dict[str, Any]) -> list[Array]:
    own = parts(config)[name]
    if hasattr(module, name):
        if own.keys() & adapter.keys():
            raise ValueError(f"an adapter of {', '.join(own)} needs weights that are apart, these are joined")
        return jnp.split(getattr(module, name)(x), list(accumulate(own.values()))[:-1], axis=-1)
    return [getattr(module, part)(x, adapter.get(part)) for part in own]


class _Attention(nnx.Module):
    def __init__(self, config: LMConfig, layer: int, attend: Attend, joined: bool):
        heads, dim = config.num_heads, config.head_dim
        _products(self, "qkv", config, config.qkv_bias, joined)
        self.o = _Dense(heads * dim, config.width, config.output_bias)
        self.q_norm = _Norm(dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = _Norm(dim, config.norm_eps) if config.qk_norm else None
        self.config, self.window, self.attend = config, config.window(layer), attend

    def __call__(self, x, positions, key_positions, mask, cache, start, adapter):
        config = self.config
        split = lambda y: y.reshape(*y.shape[:-1], -1, config.head_dim)
        q, k, v = map(split, _multiplied(self, "qkv", config, x, adapter))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = rope_frequencies(config.rope, config.head_dim)
        q, k = _rotate(q, positions, frequencies), _rotate(k, positions, frequencies)
        if self.window is not None:
            mask = mask & (positions[:, :, None] - key_positions[:, None, :] < self.window)
        if cache is None:
            mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        else:
            k, v = _write(cache[0], k, start), _write(cache[1], v, start)
            mixed = self.attend(q, k, v, mask, start, self.window)
        return self.o(mixed.reshape(*x.shape[:-1], -1), adapter.get("o")), (k, v)


class _MLP(nnx.Module):
    def __init__(self, config: LMConfig, joined: bool):
        _products(self, "gate_up", config, config.mlp_bias, joined)
        self.down = _Dense(config.mlp_width, config.width, config.mlp_bias)
        self.config = config

    def __call__(self, x, adapter):
        gate, up = _multiplied(self, "gate_up", self.config, x, adapter)
        return self.down(jax.nn.silu(gate) * up, adapter.get("down"))


class _Block(nnx.Module):
    def __init__(self, config: LMConfig, layer: int, attend: Attend, joined: bool):
        self.attention_norm = _Norm(config.width, config.norm_eps)
        self.attention = _Attention(config, layer, attend, joined)
        self.mlp_norm = _Norm(config.width, config.norm_eps)
        self.mlp = _MLP(config, joined)

    def __call__(self, x, positions, key_positions, mask, cache, start, adapter):
        mixed, kept = self.attention(self.attention_norm(x), positions, key_positions, mask, cache, start, adapter)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), adapter), kept


class _Embed(nnx.Module):
    def __init__(self, config: LMConfig):
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.width)))


class _Decoder(nnx.Module):
    def __init__(self, config: LMConfig, rngs: nnx.Rngs, attend: Attend = dense, joined: bool = False):
        del rngs
        self.embed = _Embed(config)
        self.layers = nnx.List([_Block(config, layer, attend, joined) for layer in range(config.num_layers)])
        self.norm = _Norm(config.width, config.norm_eps)
        self.head = None if config.tied else _Dense(config.width, config.vocab_size, False)

    def __call__(self, tokens, positions, key_positions, mask, cache, start, adapter):
        x = tokens if tokens.ndim == 3 else _look_up(self.embed.embedding[...], tokens)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            own = None if cache is None else (cache.keys[i], cache.values[i])
            x, (k, v) = block(x, positions, key_positions, mask, own, start, for_layer(adapter, i))
            keys.append(k)
            values.append(v)
        return self.norm(x), Cache(tuple(keys), tuple(values))
