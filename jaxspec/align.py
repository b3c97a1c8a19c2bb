"""Alignment of a drafter to its target: divergences between p and q, and one training step for any drafter.

Divergences are per position; the caller masks and averages. They compare distributions over C outcomes: a whole
vocabulary, or the target's largest probabilities and one tail, as the trace stores them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

TINY = 1e-7


class Batch(NamedTuple):
    """Packed sequences of one drafter: R rows of T tokens, of which M places predict an emitted token.

    tokens, segments: `[R, T]`; at: `[R, M]` those places; mask: `[R, M]` which of them are real.
    emitted: `[R, M]` the token that the target emitted there.
    top_ids: `[R, M, k]`; log_p: `[R, M, k + 1]` the target's kept log-probabilities, the tail's mass last.
    """

    tokens: Array
    segments: Array
    at: Array
    mask: Array
    emitted: Array
    top_ids: Array
    log_p: Array


class AlignState(NamedTuple):
    """Parameters under training and their optimiser's state."""

    params: Any
    opt: Any


class Aligner(NamedTuple):
    """init: params -> state; step: (frozen, state, batch, learning rate) -> (state, metrics); evaluate: (frozen, params,
    batch) -> sums of divergence, greedy agreement and places."""

    init: Callable[[Any], AlignState]
    step: Callable
    evaluate: Callable


def forward_kl(log_q: Array, log_p: Array) -> Array:
    """KL(p || q) in nats: `[..., C]`, `[..., C]` -> `[...]`."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def total_variation(log_q: Array, log_p: Array) -> Array:
    """1 - sum(min(p, q)), which is the probability that a drafted token is rejected (Leviathan et al. 2023)."""
    return 1.0 - jnp.sum(jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)), axis=-1)


def reverse_kl(log_q: Array, log_p: Array) -> Array:
    """KL(q || p) in nats."""
    return forward_kl(log_p, log_q)


def jensen_shannon(log_q: Array, log_p: Array, beta: float = 0.5) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: DistillSpec's JSD(beta), Zhou et al. 2024."""
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    return beta * forward_kl(log_m, log_p) + (1 - beta) * forward_kl(log_m, log_q)


def negative_log_acceptance(log_q: Array, log_p: Array) -> Array:
    """-log sum(min(p, q)): minus the log probability that a drafted token is accepted."""
    return -jax.nn.logsumexp(jnp.minimum(log_q, log_p), axis=-1)


def total_variation_policy(log_q: Array, log_p: Array) -> Array:
    """TVD++ of Direct Alignment (Goel et al. 2024): the policy gradient of total variation at the scale of its rewards.

    Drawing a token that p likes better than q does is worth 1. Of a whole vocabulary the baseline mu adds nothing to the
    gradient, since that of sum(q) is zero; it is kept for the value. mu and sigma are the place's own, not the batch's, so
    that no place depends on another: the gradient is that of `total_variation` over sigma.
    """
    q = jax.lax.stop_gradient(jnp.exp(log_q))
    reward = (jax.lax.stop_gradient(log_p) > jax.lax.stop_gradient(log_q)).astype(jnp.float32)
    mean = jnp.mean(reward, axis=-1, keepdims=True)
    advantage = (reward - mean) / jnp.maximum(jnp.std(reward, axis=-1, keepdims=True), TINY)
    return -jnp.sum(q * advantage * log_q, axis=-1)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "total_variation_policy": total_variation_policy,
    "negative_log_acceptance": negative_log_acceptance,
}


def aligner(log_q: Callable, divergence: Callable, tx: optax.GradientTransformation) -> Aligner:
    """Composes a drafter, a divergence and an optimiser.

    Args:
        log_q: (frozen, params, tokens, segments, at) -> `[R, M, V]` log-probabilities of the drafter.
        divergence: (log_q, log_p) -> per place.
        tx: turns gradients into updates of unit learning rate.
    """

    def sums(frozen, params, batch: Batch):
        q = log_q(frozen, params, batch.tokens, batch.segments, batch.at)
        per_place = divergence(coarse(q, batch.top_ids), batch.log_p)
        agree = jnp.argmax(q, axis=-1) == batch.emitted
        total = lambda x: jnp.sum(jnp.where(batch.mask, x, 0.0))
        return total(per_place), total(agree), jnp.sum(batch.mask)

    def objective(params, frozen, batch: Batch):
        loss, agree, places = sums(frozen, params, batch)
        places = jnp.maximum(places, 1)
        return loss / places, {"loss": loss / places, "agreement": agree / places}

    def init(params) -> AlignState:
        return AlignState(params, tx.init(params))

    def step(frozen, state: AlignState, batch: Batch, learning_rate: Array):
        grads, metrics = jax.grad(objective, has_aux=True)(state.params, frozen, batch)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        return AlignState(params, opt), metrics

    return Aligner(init, step, sums)


def coarse(log_q: Array, top_ids: Array) -> Array:
    """q on the target's kept tokens and one tail: `[..., V]`, `[..., k]` -> `[..., k + 1]`."""
    kept = jnp.take_along_axis(log_q, top_ids, axis=-1)
    tail = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(kept), axis=-1, keepdims=True), TINY))
    return jnp.concatenate([kept, tail], axis=-1)


def optimiser() -> optax.GradientTransformation:
    """Adam with clipped gradients; the learning rate is the caller's, so that one program serves every candidate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98))


def schedule(step: int, steps: int, peak: float, warmup: float, *, falls: bool = True) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine down to a tenth of the peak if it `falls`.

    Runs that go on from one that did not fall have spent no step at a low rate in vain (Hu et al. 2024, MiniCPM).
    """
    rise = max(1, round(warmup * steps))
    floor = peak / 10 if falls else peak
    rate = optax.warmup_cosine_decay_schedule(peak / rise, peak, rise, max(steps, rise + 1), floor)
    return np.asarray(rate(step)).item()
