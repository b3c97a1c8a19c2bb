"""Logits to distributions, and one random stream a row.

A row's noise is keyed by what it is for, `(seed, request, position, role, node)`, never by its slot or its neighbours.
`of_the_round` and `of_the_token` are the two ways of keying it that a `jaxspec.types.Rule` can choose from.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.types import Sampling

DRAFT, VERIFY = 0, 1
CANDIDATES = 128  # logits of a row that are put in order: a nucleus of more is rare, top-k of more unusual


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
        logits: `[B, ..., V]` float32, not under `vmap`, which would turn the choice to search into searching always.
        sampling: rows' settings; None is greedy for every row.

    Returns:
        `[B, ..., V]` normalised natural logs, -inf outside the support. Greedy rows put all mass on the first
        largest logit. Top-p keeps a token if all likelier ones of the k have less than p of their mass, summed in float32:
        where they have p but for rounding it may be kept or not. Tokens tied with the last one kept are kept too.
    """
    if sampling is None:
        return _greedy(logits)
    over_row = lambda setting: setting.reshape(setting.shape + (1,) * (logits.ndim - 1))
    temperature = over_row(sampling.temperature)
    x = logits / jnp.where(temperature > 0, temperature, 1.0)
    if sampling.top_k is not None or sampling.top_p is not None:
        vocab = logits.shape[-1]
        k = vocab if sampling.top_k is None else jnp.clip(over_row(sampling.top_k), 1, vocab)
        k = jnp.where(temperature > 0, k, 1)  # a greedy row has the shortest search
        p = 1.0 if sampling.top_p is None else over_row(sampling.top_p)
        cut = lambda x: jnp.where(x >= _smallest_kept(x, k, p), x, -jnp.inf)
        x = jax.lax.cond(_leaves_out(sampling, vocab), cut, lambda x: x, x)
    return jnp.where(temperature > 0, jax.nn.log_softmax(x, axis=-1), _greedy(logits))


def draw(key: Array, log_p: Array) -> Array:
    """One token from `log_p [..., V]` by one key, the one that `jax.random.categorical` draws; consumes `key`."""
    noisy = log_p + jax.random.gumbel(key, log_p.shape, log_p.dtype)
    # Where noise feeds an argmax, XLA computes its logarithms one by one on a CPU; a maximum has them in vectors.
    return jnp.argmax(noisy == jnp.max(noisy, axis=-1, keepdims=True), axis=-1)


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


def _smallest_kept(x: Array, k: Array | int, p: Array | float) -> Array:
    """Value of the last token kept, `[B, ..., 1]`; so are k and p, or one number for all rows.

    Looked for among the candidates, whose order tells it at once, and by halving where it is none of these.
    """
    vocab = x.shape[-1]
    largest = jax.lax.top_k(x, _candidates(vocab))[0]
    most = jnp.max(x, axis=-1, keepdims=True)  # as largest[..., :1] XLA would sort whole rows for the two slices
    weight, rank = jnp.exp(x - most), jnp.arange(largest.shape[-1])
    own = jnp.where(rank < k, jnp.exp(largest - most), 0.0)
    bound = p * jnp.where(k < vocab, _total(own), _total(weight))
    inside = (rank < k) & ((jnp.cumsum(own, axis=-1) - own < bound) | (p >= 1))
    among = jnp.min(jnp.where(inside | (rank == 0), largest, jnp.inf), axis=-1, keepdims=True)
    if len(rank) == vocab:
        return among
    found = (k <= len(rank)) | ((k == vocab) & (p < 1) & (_total(own) >= bound))

    count = lambda least: _total((x > least).astype(jnp.int32))
    mass = lambda least: _total(jnp.where(x > least, weight, 0.0))
    kth = _least(lambda least: count(least) < k, x, ~found & (k < vocab))
    bound = p * (mass(kth) + (k - count(kth)) * jnp.exp(kth - most))  # of those tied at the end k leaves some out
    nucleus = _least(lambda least: mass(least) < bound, x, ~found & (p < 1))
    return jnp.where(found, among, jnp.minimum(jnp.maximum(kth, nucleus), most))


def _candidates(vocab: int) -> int:
    """How many of the largest are put in order; all on an accelerator, where the host waits for each step of a search."""
    return min(CANDIDATES, vocab) if jax.default_backend() == "cpu" else vocab


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _least(holds: Callable[[Array], Array], x: Array, sought: Array) -> Array:
    """Least float32 from a row's smallest to its largest for which `holds`; -inf in rows where it is not `sought`.

    Floats are halved as the integers that have their order, 32 times at most.
    """
    low = _ordinal(jnp.min(x, axis=-1, keepdims=True)) - 1
    high = jnp.where(sought, _ordinal(jnp.max(x, axis=-1, keepdims=True)), low)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which does not overflow
        enough = holds(_float(middle))
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, high = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] + 1 < bounds[1]), halve, (low, high))
    return jnp.where(sought, _float(high), -jnp.inf)


def _ordinal(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _float(ordinal: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(ordinal < 0, ordinal ^ 0x7FFFFFFF, ordinal), jnp.float32)
