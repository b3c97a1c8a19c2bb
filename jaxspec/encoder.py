"""Bidirectional text encoders of the BERT architecture, and pooling of what any encoder says into one vector a text.

The modules are Flax NNX and define parameters and forward pass; what leaves this file are pure functions over plain
dicts of arrays. BERT, RoBERTa and XLM-RoBERTa differ in `EncoderConfig` and nowhere else.
Source: BERT, https://arxiv.org/abs/1810.04805.
"""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_new": jax.nn.gelu}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of an encoder; `padding_id` is set where positions count from behind it (RoBERTa), else they begin at 0."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    num_positions: int
    num_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    padding_id: int | None = None

    @property
    def longest(self) -> int:
        """Most tokens of a text: RoBERTa's position table spends its first rows on padding."""
        return self.num_positions - (0 if self.padding_id is None else self.padding_id + 1)


def abstract(config: EncoderConfig, dtype=jnp.float32) -> dict:
    """Shapes and types of the parameters, nothing allocated."""
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: _Encoder(config, nnx.Rngs(0)))))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def forward(config: EncoderConfig, params: dict, tokens: Array, lengths: Array) -> Array:
    """Last hidden states `[B, T, H]` of right-padded texts `[B, T]` with `lengths [B]`; padding is seen by no token."""
    encoder = nnx.merge(_graph(config), nnx.State(params))
    return encoder(tokens, _positions(config, tokens), _real(tokens.shape[1], lengths))


def mean_pool(hidden: Array, lengths: Array) -> Array:
    """Mean over each text's own tokens as a float32 unit vector: `[B, T, H]`, `[B]` -> `[B, H]`.

    A text of no tokens has no direction and stays zero.
    """
    own = _real(hidden.shape[1], lengths)[..., None]
    total = jnp.where(own, hidden.astype(jnp.float32), 0.0).sum(1)
    mean = total / jnp.maximum(lengths, 1)[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _real(width: int, lengths: Array) -> Array:
    return jnp.arange(width)[None] < lengths[:, None]


def _positions(config: EncoderConfig, tokens: Array) -> Array:
    if config.padding_id is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # A text may itself spell the padding token; RoBERTa leaves it uncounted.
    counted = (tokens != config.padding_id).astype(jnp.int32)
    return jnp.cumsum(counted, axis=1) * counted + config.padding_id


@lru_cache(maxsize=8)
def _graph(config: EncoderConfig):
    return nnx.split(nnx.eval_shape(lambda: _Encoder(config, nnx.Rngs(0))))[0]


class _Attention(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        dense = lambda: nnx.Linear(config.width, config.width, rngs=rngs)
        self.q, self.k, self.v, self.o = dense(), dense(), dense(), dense()
        self.num_heads = config.num_heads

    def __call__(self, x: Array, real: Array) -> Array:
        split = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=real[:, None, None, :])
        return self.o(mixed.reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.up = nnx.Linear(config.width, config.mlp_width, rngs=rngs)
        self.down = nnx.Linear(config.mlp_width, config.width, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class _Block(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.attention = _Attention(config, rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = _MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: Array, real: Array) -> Array:
        x = self.attention_norm(x + self.attention(x, real))
        return self.mlp_norm(x + self.mlp(x))


class _Embed(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.num_positions, config.width, rngs=rngs)
        self.types = nnx.Embed(config.num_types, config.width, rngs=rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, tokens: Array, positions: Array) -> Array:
        first_type = self.types(jnp.zeros_like(tokens))
        return self.norm(self.words(tokens) + self.positions(positions) + first_type)


class _Encoder(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.embed = _Embed(config, rngs)
        self.layers = nnx.List([_Block(config, rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: Array, positions: Array, real: Array) -> Array:
        x = self.embed(tokens, positions)
        for block in self.layers:
            x = block(x, real)
        return x


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, mean of squares less square of mean, cancels digits that PyTorch keeps.
    return nnx.LayerNorm(config.width, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)
