"""Several drafts of one token: how they are drawn, and the most that any rule can accept of them.

A scheme makes n drafts out of the drafter's distribution q. Whatever rule then chooses the token that is emitted, so that
it is distributed as the target's p, it is one of the drafts with at most the probability that `optimal_acceptance` gives.
Source: Hu et al. 2025, Towards Optimal Multi-Draft Speculative Decoding, https://arxiv.org/abs/2502.18779. The rules are
in `jaxspec.verify`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

STEP = 0.5  # of log t; the error falls as exp(-pi ** 2 / STEP), which is 3e-9
TIMES = np.exp(np.arange(-16.0, 32.0, STEP)).astype(np.float32)
LEAST = 1e-12  # what is rarer comes after the last of TIMES and counts as never drawn


class Scheme(NamedTuple):
    """A way of making n drafts.

    draw: (key, log_q `[V]`, logits `[V]`, n) -> (tokens `[n]`, log_q `[n, V]` that each was drawn from given those before).
        Consumes the key. Where nothing of q is left the next by `logits` follow, for certain.
    optimum: (p `[V]`, q `[V]`, n) -> the most that can be accepted.
    """

    draw: Callable[[Array, Array, Array, int], tuple[Array, Array]]
    optimum: Callable[[Array, Array, int], Array]


def optimal_acceptance(p: Array, q: Array, number: int, scheme: str) -> Array:
    """The largest probability that a token distributed as p is among `number` drafts from q, over all rules.

    Args:
        p, q: `[V]` distributions of target and drafter.
        scheme: a name in `SCHEMES`.
    """
    return SCHEMES[scheme].optimum(p, q, number)


def with_replacement(key: Array, log_q: Array, logits: Array, number: int) -> tuple[Array, Array]:
    """Independent draws from q, which may agree."""
    del logits
    tokens = jax.random.categorical(key, log_q, shape=(number,)).astype(jnp.int32)
    return tokens, jnp.broadcast_to(log_q, (number, *log_q.shape))


def without_replacement(key: Array, log_q: Array, logits: Array, number: int) -> tuple[Array, Array]:
    """Draws each from what is left of q, the first as `sampling.draw` does with that key.

    One noise serves all: the n largest of log q + Gumbel noise are such draws (https://arxiv.org/abs/1903.06059).
    """
    noise = jax.random.gumbel(key, log_q.shape, log_q.dtype)
    return _distinct(log_q, logits, [noise] * number)


def greedy_drafts(key: Array, log_q: Array, logits: Array, number: int) -> tuple[Array, Array]:
    """The n - 1 likeliest tokens, for certain, and one draw from what is left of q."""
    noise = jax.random.gumbel(key, log_q.shape, log_q.dtype)
    return _distinct(log_q, logits, [*[None] * (number - 1), noise])


def _distinct(log_q: Array, logits: Array, noises: Sequence[Array | None]) -> tuple[Array, Array]:
    """A token for each noise from what those before left of q; None takes the likeliest."""
    place = jnp.arange(log_q.shape[0])
    free = jnp.ones(log_q.shape, bool)
    tokens, laws = [], []
    for noise in noises:
        left = jnp.where(free, log_q, -jnp.inf)
        spent = ~jnp.any(left > -jnp.inf)
        keen = left if noise is None else left + noise
        token = jnp.argmax(jnp.where(spent, jnp.where(free, logits, -jnp.inf), keen))
        alone = jnp.where(place == token, 0.0, -jnp.inf)
        drawn = jax.nn.log_softmax(jnp.where(spent, 0.0, left))
        laws.append(alone if noise is None else jnp.where(spent, alone, drawn))
        tokens.append(token.astype(jnp.int32))
        free &= place != token
    return jnp.stack(tokens), jnp.stack(laws)


def _of_independent(p: Array, q: Array, number: int) -> Array:
    """1 + min over sets H of p(H) - q(H) ** n; the minimum is at a prefix of the tokens by q / p."""
    order = _by_ratio(p, q)
    return 1 + jnp.minimum(jnp.min(jnp.cumsum(p[order]) - jnp.cumsum(q[order]) ** number), 0.0)


def _of_distinct(p: Array, q: Array, number: int) -> Array:
    """The same with the probability that all draws without replacement lie in H."""
    order = _by_ratio(p, q)
    return jnp.minimum(jnp.min(jnp.cumsum(p[order]) + _leaves(q[order], number)), 1.0)


def _of_greedy(p: Array, q: Array, number: int) -> Array:
    """What is kept of p on the n - 1 likeliest, and its overlap with the rest of q."""
    best = jnp.zeros(q.shape, bool).at[jnp.argsort(-q)[: number - 1]].set(True)
    rest = jnp.where(best, 0.0, q)
    rest = rest / jnp.maximum(rest.sum(), jnp.finfo(q.dtype).tiny)
    return jnp.sum(jnp.where(best, p, jnp.minimum(p, rest)))


def _by_ratio(p: Array, q: Array) -> Array:
    """Tokens by falling q / p; those that neither knows come last."""
    return jnp.argsort(-jnp.where(q > 0, q / jnp.maximum(p, jnp.finfo(p.dtype).tiny), 0.0))


def _leaves(q: Array, number: int) -> Array:
    """`[V]` how likely n draws without replacement do not all lie among the first 1, 2, ... tokens.

    Tokens come at exponential times of rates q, and the first n to come are the draws: the integral over the time t at which
    the first of the other tokens comes, of the probability that fewer than n of the set have come by then. All terms are
    positive, so that nothing cancels in float32. With fewer than n tokens there are fewer draws.
    """
    q = jnp.where(q > LEAST, q, 0.0)
    counted = jnp.arange(number) < jnp.sum(q > 0)
    others = jnp.append(jnp.cumsum(q[::-1])[::-1][1:], 0.0)
    nobody = jnp.zeros((len(TIMES), number)).at[:, 0].set(1.0)

    def add(come: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        rate, other = token
        late, one_more = jnp.exp(-rate * TIMES), jnp.pad(come, ((0, 0), (1, 0)))[:, :-1]
        come = come * late[:, None] - one_more * jnp.expm1(-rate * TIMES)[:, None]
        first = other * TIMES * jnp.exp(-other * TIMES)
        return come, STEP * jnp.sum(first * jnp.sum(jnp.where(counted, come, 0.0), axis=-1))

    return jax.lax.scan(add, nobody, (q, others))[1]


SCHEMES = {
    "with-replacement": Scheme(with_replacement, _of_independent),
    "without-replacement": Scheme(without_replacement, _of_distinct),
    "greedy-drafts": Scheme(greedy_drafts, _of_greedy),
}
