"""Training of a drafter of features: towards the target's next hidden state, and through its head towards its distribution.

The target reads the texts again in every step, so that nothing of it is kept but its weights. Sources: EAGLE,
https://arxiv.org/abs/2401.15077, of the two terms and of noise on what is read; FSPAD, https://arxiv.org/abs/2408.15562, in
whose variant the residual, if there is one, lies on the way to the second term alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxspec.align import AlignState, Batch
from jaxspec.drafters.feature import FeatureParams, FeatureWeights, fused, logits, shifted, tables_of
from jaxspec.transformer import LMConfig, forward, unembed


class Trainer(NamedTuple):
    """init: weights -> state; step: (target's params, state, batch, learning rate, key) -> (state, metrics)."""

    init: Callable[[FeatureWeights], AlignState]
    step: Callable[..., tuple[AlignState, dict[str, Array]]]


def trainer(
    target: LMConfig,
    layer: LMConfig,
    tx: optax.GradientTransformation,
    *,
    logits_weight: float,
    noise: float,
    dtype: Any = jnp.float32,
) -> Trainer:
    """Composes the two terms and an optimiser, for weights of any variant, which are float32.

    Args:
        layer: `single_layer` of the target's shape.
        tx: turns gradients into updates of unit learning rate.
        logits_weight: of the cross entropy from the target's distribution; the feature's smooth L1 has weight 1.
        noise: spread of uniform noise on the features that are read, as a share of their root mean square.
        dtype: of activations.
    """

    def objective(weights: FeatureWeights, frozen: dict, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
        own = FeatureParams(low, tables_of(layer, frozen))
        features = forward(target, frozen, batch.tokens, segments=batch.segments)
        read = fused(own, batch.tokens, before(noisy(features, noise, key), batch.segments))
        at = lambda leaf: jnp.take_along_axis(leaf, batch.at[..., None], axis=1)
        guess, truth = at(forward(layer, own.model, read, segments=batch.segments)), at(features)
        said, meant = logits(layer, own, guess), unembed(target, frozen, truth)
        mean = lambda leaf: jnp.sum(jnp.where(batch.mask, leaf, 0.0)) / jnp.maximum(jnp.sum(batch.mask), 1)
        regression = mean(smooth_l1(guess, truth))
        cross_entropy = mean(optax.softmax_cross_entropy(said, jax.nn.softmax(meant)))
        metrics = {"regression": regression, "cross_entropy": cross_entropy}
        metrics["agreement"] = mean(jnp.argmax(said, -1) == jnp.argmax(meant, -1))
        return regression + logits_weight * cross_entropy, metrics

    def step(frozen: dict, state: AlignState, batch: Batch, learning_rate: Array, key: Array):
        grads, metrics = jax.grad(objective, has_aux=True)(state.params, frozen, batch, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        return AlignState(params, opt), metrics

    return Trainer(lambda weights: AlignState(weights, tx.init(weights)), step)


def smooth_l1(guess: Array, truth: Array) -> Array:
    """Half the squared error, beyond 1 its amount less a half, in the mean over columns: `[..., H]` -> `[...]`."""
    return jnp.mean(optax.huber_loss(guess.astype(jnp.float32), truth.astype(jnp.float32)), axis=-1)


def noisy(features: Array, share: float, key: Array) -> Array:
    """Features with uniform noise up to a share of their root mean square: what is read in drafting is a guess."""
    level = jnp.sqrt(jnp.mean(jnp.square(features.astype(jnp.float32))))
    return features + (share * level * jax.random.uniform(key, features.shape, minval=-1)).astype(features.dtype)


def before(features: Array, segments: Array) -> Array:
    """The feature before each token of packed texts `[R, T, H]`, zeros at the beginning of every text."""
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(same[..., None], shifted(features), 0)
