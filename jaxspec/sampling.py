"""Logits to distributions, and one random stream a row.

A row's noise is keyed by what it is for, `(seed, request, position, role, node)`, never by its slot or its neighbours.
`of_the_round` and `of_the_token` are the two ways of keying it that a `jaxspec.types.Rule` can choose from.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.types import Sampling

DRAFT, VERIFY = 0, 1


def row_key(seed: int | Array, request: int | Array) -> Array:
    """The random stream of one request."""
    return jax.random.fold_in(jax.random.key(seed), request)


def of_the_round(key: Array, start: Array, role: int, node: Array, depth: Array) -> Array:
    """Fresh noise for every draw of the round that begins at `start`; none is used twice."""
    del depth
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, start), role), node)


def of_the_token(key: Array, start: Array, role: int, node: Array, depth: Array) -> Array:
    """One noise for every draw of the token at position `start + depth`, whoever draws it and in whichever round."""
    del role, node
    return jax.random.fold_in(key, start + depth)


def log_probs(logits: Array, sampling: Sampling | None) -> Array:
    """Distribution that a row samples from: temperature, then top-k, then top-p, as transformers orders them.

    Columns of top-k and top-p that keep everything cost nothing, so rows of all settings can share a program.

    Args:
        logits: `[B, ..., V]` float32, not under `vmap`, which would turn the choice to sort into sorting always.
        sampling: rows' settings; None is greedy for every row.

    Returns:
        `[B, ..., V]` normalised natural logs, -inf outside the support. Greedy rows put all mass on the first
        largest logit. Tokens tied with the last one kept by top-k or top-p are kept too.
    """
    if sampling is None:
        return _greedy(logits)
    over_row = lambda setting: setting.reshape(setting.shape + (1,) * (logits.ndim - 1))
    temperature = over_row(sampling.temperature)
    x = logits / jnp.where(temperature > 0, temperature, 1.0)
    if sampling.top_k is not None or sampling.top_p is not None:
        cut = lambda x: jnp.where(x >= _smallest_kept(x, sampling, over_row), x, -jnp.inf)
        x = jax.lax.cond(_leaves_out(sampling, logits.shape[-1]), cut, lambda x: x, x)
    return jnp.where(temperature > 0, jax.nn.log_softmax(x, axis=-1), _greedy(logits))


def draw(key: Array, log_p: Array) -> Array:
    """One token from `log_p [..., V]` by one key; consumes `key`."""
    return jax.random.categorical(key, log_p, axis=-1)


def _greedy(logits: Array) -> Array:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)


def _leaves_out(sampling: Sampling, vocab: int) -> Array:
    """Whether any row that samples leaves any token out."""
    cuts = jnp.zeros(sampling.temperature.shape, bool)
    if sampling.top_k is not None:
        cuts |= sampling.top_k < vocab
    if sampling.top_p is not None:
        cuts |= sampling.top_p < 1
    return jnp.any(cuts & (sampling.temperature > 0))


def _smallest_kept(x: Array, sampling: Sampling, over_row) -> Array:
    vocab = x.shape[-1]
    descending = -jnp.sort(-x, axis=-1)
    keep = jnp.ones(x.shape, bool)
    if sampling.top_k is not None:
        keep &= jnp.arange(vocab) < over_row(jnp.maximum(sampling.top_k, 1))
    if sampling.top_p is not None:
        p = jax.nn.softmax(jnp.where(keep, descending, -jnp.inf), axis=-1)
        top_p = over_row(sampling.top_p)
        keep &= (jnp.cumsum(p, axis=-1) - p < top_p) | (top_p >= 1)
    return jnp.min(jnp.where(keep | (jnp.arange(vocab) == 0), descending, jnp.inf), axis=-1, keepdims=True)
