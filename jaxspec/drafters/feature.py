"""Drafts on the target's features: a single layer guesses the target's next hidden state, and the target's own head reads it.

A token is read together with the feature that stood before it, the target's where the text is verified and the layer's own
guess further on. Sources: EAGLE, https://arxiv.org/abs/2401.15077, of drafting features, and FSPAD,
https://arxiv.org/abs/2408.15562, of feature sampling and partial alignment distillation.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.attention import Attend, dense
from jaxspec.drafters.lm import drawing
from jaxspec.transformer import Cache, LMConfig, embed, extend, init, least_columns, prefill, unembed
from jaxspec.types import Draft, Drafter, Prompt

WIDER = 2  # columns of the space in which features are sampled, over those of a feature
RANK = 8  # columns of a feature over those of the residual adapter


class Concatenation(NamedTuple):
    """EAGLE's way to fuse feature and embedding: side by side through `kernel [2H, H]` and `bias [H]`."""

    kernel: Array
    bias: Array


class Sampler(NamedTuple):
    """FSPAD's: `feature [H, F]` in a wider space, gated there by `token [H, F]`, and back by `out [F, H]`.

    The feature leaves open which token is drawn after it; the token that was drawn picks its part.
    """

    feature: Array
    token: Array
    out: Array


class Residual(NamedTuple):
    """FSPAD's partial alignment: `down [H, R]` and `up [R, H]` on the way to the logits alone, so that the feature that is
    read next need not be the one that the head wants."""

    down: Array
    up: Array


class FeatureWeights(NamedTuple):
    """What is trained: a decoder of one layer without its tables, how its input is fused, and a residual or None."""

    decoder: dict
    fusion: Concatenation | Sampler
    residual: Residual | None = None


class FeatureParams(NamedTuple):
    """The weights, and by reference the target's tables: `embed`, and `head` where the target has one apart."""

    own: FeatureWeights
    tables: dict

    @property
    def model(self) -> dict:
        """The decoder with its tables, as `jaxspec.transformer` takes it."""
        return self.own.decoder | self.tables


class FeatureState(NamedTuple):
    """The layer's cache of `length [B]` tokens, all read with true features, and what it made of the last, `feature [B, H]`."""

    cache: Cache
    length: Array
    feature: Array


VARIANTS: dict[str, tuple[type, bool]] = {
    "plain": (Concatenation, False),
    "sampling": (Sampler, False),
    "alignment": (Sampler, True),
}
"""How the input is fused, and whether there is a residual."""


def feature_drafter(
    config: LMConfig,
    num_speculative_tokens: int,
    *,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts a chain, each token by the feature that the layer guesses from the one before.

    A round ends with the emitted tokens read once more, with the target's features in place of guesses; that call makes the
    first guess of the next round, so that K tokens cost K calls.

    Args:
        config: `single_layer` of the target's.
        vocab_size: the target's, where it is padded further.
    """

    def read(params: FeatureParams, cache: Cache, tokens: Array, before: Array, start: Array) -> tuple[Array, Cache]:
        return extend(config, params.model, cache, fused(params, tokens, before), start, attend=attend)

    def begin(params: FeatureParams, prompt: Prompt, slots: int) -> FeatureState:
        inputs = fused(params, prompt.tokens, shifted(prompt.features))
        hidden, cache = prefill(config, params.model, inputs, prompt.length, slots, dtype)
        return FeatureState(cache, jnp.asarray(prompt.length), _row(hidden, prompt.length - 1))

    def propose(params: FeatureParams, state: FeatureState, tokens: Array, length: Array, noise, sampling):
        del tokens
        choose = drawing(lambda feature: logits(config, params, feature, vocab_size), noise, sampling)
        go_on = _guessing(lambda *own: read(params, *own), choose, least_columns(len(length)))
        token, said = choose(state.feature, 0)
        start = (state.cache, state.feature, token, length)
        (cache, *_), rest = jax.lax.scan(go_on, start, jnp.arange(1, num_speculative_tokens))
        put = lambda first, others: jnp.moveaxis(jnp.concatenate([first[None], others]), 0, 1)
        drafted, log_q = jax.tree.map(put, said, rest)
        count = jnp.full(length.shape, num_speculative_tokens, jnp.int32)
        return Draft(drafted, count, log_q), state._replace(cache=cache)

    def commit(params: FeatureParams, state: FeatureState, verdict, scores) -> FeatureState:
        before = jnp.take_along_axis(scores.features, verdict.path[..., None], axis=1)
        hidden, cache = read(params, state.cache, verdict.tokens, before, state.length)
        guess = _row(hidden, jnp.maximum(verdict.num_emitted - 1, 0))
        feature = jnp.where(verdict.num_emitted[:, None] > 0, guess, state.feature)
        return FeatureState(cache, state.length + verdict.num_emitted, feature)

    sees = lambda features: features
    return Drafter(num_speculative_tokens, begin, propose, commit, num_speculative_tokens, sees=sees)


def single_layer(config: LMConfig) -> LMConfig:
    """The shape of the drafter's decoder: one layer as the target's, which sees all of the text."""
    return replace(config, num_layers=1, windows=())


def tables_of(config: LMConfig, target: dict) -> dict:
    """The tables of a target of whose shape `config` is the `single_layer`; of a widened one the part that is alive."""
    cut = lambda table, *sizes: table if table.shape == sizes else table[tuple(map(slice, sizes))]
    tables = {"embed": {"embedding": cut(target["embed"]["embedding"], config.vocab_size, config.width)}}
    if not config.tied:
        tables["head"] = {"kernel": cut(target["head"]["kernel"], config.width, config.vocab_size)}
    return tables


def init_weights(config: LMConfig, variant: str, target: dict, key: Array) -> FeatureWeights:
    """Fresh weights of one of `VARIANTS`, float32, with the target's last norm; consumes `key`.

    A residual begins without effect. Embeddings are small beside features: what reads them begins as much larger.
    """
    way, with_residual = VARIANTS[variant]
    first, second, third = jax.random.split(key, 3)
    scale = jnp.array(
        target["norm"]["scale"][: config.width], jnp.float32, copy=True
    )  # the target's own must not be donated
    decoder = init(replace(config, vocab_size=1, tied=True), first)
    level = jnp.sqrt(jnp.mean(jnp.square(target["embed"]["embedding"].astype(jnp.float32))))
    residual = _no_residual(config.width, third) if with_residual else None
    return FeatureWeights(
        {"layers": decoder["layers"], "norm": {"scale": scale}}, _fusion(way, config.width, level, second), residual
    )


def shifted(features: Array) -> Array:
    """The feature before each token: `[B, T, H]` -> `[B, T, H]`, zeros before the first."""
    return jnp.pad(features, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def fused(params: FeatureParams, tokens: Array, before: Array) -> Array:
    """What the layer reads of tokens `[B, T]` and the features before them `[B, T, H]`: `[B, T, H]`."""
    fusion, embedded = params.own.fusion, embed(params.tables, tokens)
    if isinstance(fusion, Sampler):
        return ((before @ fusion.feature) * jax.nn.sigmoid(embedded @ fusion.token)) @ fusion.out
    return jnp.concatenate([before, embedded], axis=-1) @ fusion.kernel + fusion.bias


def logits(config: LMConfig, params: FeatureParams, feature: Array, vocab_size: int | None = None) -> Array:
    """What the target's head makes of guessed features `[..., H]`: `[..., V]`, float32."""
    residual = params.own.residual
    if residual is not None:
        feature = feature + jax.nn.silu(feature @ residual.down) @ residual.up
    return unembed(config, params.model, feature, vocab_size)


def _fusion(way: type, width: int, level: Array, key: Array) -> Concatenation | Sampler:
    first, second, third = jax.random.split(key, 3)
    drawn = lambda own, *shape: jax.random.normal(own, shape) / jnp.sqrt(shape[0])
    wide = WIDER * width if way is Sampler else width
    feature, token = drawn(first, width, wide), drawn(second, width, wide) / level
    if way is Sampler:
        return Sampler(feature, token, drawn(third, wide, width))
    return Concatenation(jnp.concatenate([feature, token]), jnp.zeros(width))


def _no_residual(width: int, key: Array) -> Residual:
    rank = max(width // RANK, 1)
    return Residual(jax.random.normal(key, (width, rank)) / jnp.sqrt(width), jnp.zeros((rank, width)))


def _guessing(read: Callable, choose: Callable, columns: int) -> Callable:
    """A step of the chain: reads the last token with the guess before it, and chooses by the guess that follows.

    Where several columns are cheaper than one they all are that token; the first sees none of the others.
    """

    def go_on(carry, step):
        cache, feature, token, at = carry
        repeated = lambda leaf: jnp.repeat(leaf[:, None], columns, axis=1)
        hidden, cache = read(cache, repeated(token), repeated(feature), at)
        following, said = choose(hidden[:, 0], step)
        return (cache, hidden[:, 0], following, at + 1), said

    return go_on


def _row(hidden: Array, at: Array) -> Array:
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
