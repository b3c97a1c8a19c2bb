"""Alignment of a drafter to its target: divergences between p and q, and one training step for any drafter.

Divergences are per position; the caller masks and averages. They compare distributions over C outcomes: a whole
vocabulary, or the target's largest probabilities and one tail, as the trace stores them. A loss is what a place costs
given all that a batch says of it: a divergence from the kept distribution, or, of the text alone, its likelihood.
"""

from collections.abc import Callable
from functools import partial
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
    """init: params -> state; step: (frozen, state, batch, learning rate, reference) -> (state, metrics), where the
    reference is another drafter's params, or None for all places to count; evaluate: (frozen, params, batch) -> sums of
    loss, greedy agreement and places."""

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


def from_kept(divergence: Callable) -> Callable:
    """The loss that is a divergence from what is kept of p: (log_q `[R, M, V]`, batch, temperature) -> `[R, M]`.

    At another temperature than 1 the kept tokens alone are compared, p and q each among them. That is exact: powers of the
    kept probabilities are known up to their sum, while what the tail's many would add to it is not.
    """

    def loss(log_q: Array, batch: Batch, temperature: float = 1.0) -> Array:
        if temperature == 1:
            return divergence(coarse(log_q, batch.top_ids), batch.log_p)
        kept = jnp.take_along_axis(log_q, batch.top_ids, axis=-1)
        return divergence(tempered(kept, temperature), tempered(batch.log_p[..., :-1], temperature))

    return loss


def tempered(log_p: Array, temperature: float) -> Array:
    """What logits over the temperature give, of logits or log-probabilities: p^(1 / T), normalised over the last axis."""
    return jax.nn.log_softmax(log_p / temperature, axis=-1)


def negative_log_likelihood(log_q: Array, batch: Batch, temperature: float = 1.0) -> Array:
    """-log q of the token that was emitted, in nats: what a text teaches when its writer shows no distribution.

    It is forward KL from a p that is certain of that token, whether or not the trace kept it: a loss, not a divergence,
    since no distribution enters.
    """
    log_q = log_q if temperature == 1 else tempered(log_q, temperature)
    return -jnp.take_along_axis(log_q, batch.emitted[..., None], axis=-1)[..., 0]


LOSSES = {name: from_kept(own) for name, own in DIVERGENCES.items()}
LOSSES |= {"negative_log_likelihood": negative_log_likelihood}


def loss_of(divergence: str, beta: float) -> Callable:
    """The loss of that name; `beta` is that of JSD(beta)."""
    return from_kept(partial(jensen_shannon, beta=beta)) if divergence == "jensen_shannon" else LOSSES[divergence]


def aligner(
    log_q: Callable, loss: Callable, tx: optax.GradientTransformation, *, share: float = 1.0, parts: int = 1
) -> Aligner:
    """Composes a drafter, a loss and an optimiser.

    Args:
        log_q: (frozen, params, tokens, segments, at) -> `[R, M, V]` log-probabilities of the drafter.
        loss: (log_q, batch) -> per place.
        tx: turns gradients into updates of unit learning rate.
        share: of a step's places, those that count when a reference is given, see `hardest`.
        parts: a step's rows are read in so many parts, one after another; the gradient is that of all of them.
    """

    def per_place(frozen, params, batch: Batch):
        q = log_q(frozen, params, batch.tokens, batch.segments, batch.at)
        return loss(q, batch), jnp.argmax(q, axis=-1) == batch.emitted

    def sums(frozen, params, batch: Batch):
        lost, agree = per_place(frozen, params, batch)
        total = lambda x: jnp.sum(jnp.where(batch.mask, x, 0.0))
        return total(lost), total(agree), jnp.sum(batch.mask)

    def objective(params, frozen, batch: Batch, places: Array):
        lost, agree, _ = sums(frozen, params, batch)
        return lost / places, {"loss": lost / places, "agreement": agree / places}

    def gradient(frozen, params, batch: Batch):
        places = jnp.maximum(jnp.sum(batch.mask), 1)
        of = lambda part: jax.grad(objective, has_aux=True)(params, frozen, part, places)
        if parts == 1:
            return of(batch)
        return _sum_over(of, _apart(batch, parts))

    def excess(frozen, params, reference, batch: Batch) -> Array:
        worse = lambda own: per_place(frozen, params, own)[0] - per_place(frozen, reference, own)[0]
        return jnp.swapaxes(jax.lax.map(worse, _apart(batch, parts)), 0, 1).reshape(batch.mask.shape)

    def init(params) -> AlignState:
        return AlignState(params, tx.init(params))

    def step(frozen, state: AlignState, batch: Batch, learning_rate: Array, reference=None):
        if reference is not None:
            own = excess(frozen, state.params, reference, batch)
            batch = batch._replace(mask=hardest(own, batch.mask, share))
        grads, metrics = gradient(frozen, state.params, batch)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        return AlignState(params, opt), metrics

    return Aligner(init, step, sums)


def hardest(excess: Array, mask: Array, share: float) -> Array:
    """Which of the real places `[R, M]` count: the share of them, at least one, whose excess is the largest.

    Excess is what a place costs the drafter over what it costs a reference: AdaSPEC's measure of how much is still to be
    learnt there (https://arxiv.org/abs/2510.19779). Places are all the step's, and of equal ones the earlier count.
    """
    order = jnp.argsort(jnp.where(mask, -excess, jnp.inf), axis=None)
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    number = jnp.maximum(jnp.round(share * jnp.sum(mask)), 1)
    return mask & (rank.reshape(mask.shape) < number)


def _apart(batch: Batch, parts: int) -> Batch:
    """Rows `[R, ...]` as parts `[N, R / N, ...]`, every N-th row in a part, so that each lies over all devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def _sum_over(of: Callable, parts: Batch):
    """The sum of `of` over parts, one at a time in memory."""
    zeros = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), zeros)
    total, _ = jax.lax.scan(lambda sofar, part: (jax.tree.map(jnp.add, sofar, of(part)), None), start, parts)
    return total


def coarse(log_q: Array, top_ids: Array) -> Array:
    """q on the target's kept tokens and one tail: `[..., V]`, `[..., k]` -> `[..., k + 1]`."""
    kept = jnp.take_along_axis(log_q, top_ids, axis=-1)
    tail = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(kept), axis=-1, keepdims=True), TINY))
    return jnp.concatenate([kept, tail], axis=-1)


def top_and_tail(logits: Array, top: int) -> tuple[Array, Array, Array]:
    """What is kept of p: the ids and log-probabilities of the `top` largest `[..., top]`, and the others' log-mass `[...]`."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    kept, ids = jax.lax.top_k(log_p, top)
    tail = jnp.log1p(-jnp.minimum(jnp.exp(kept).sum(-1), 1 - TINY))
    return ids, kept, tail


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
