"""Trigram tables of a fixed shape: what follows two tokens, and with what weight; they learn as texts go on.

A bigram is hashed to one bucket, which it must own to be known. What is said gains weight. A thirteenth successor takes the
place of the least; a bigram that finds its bucket taken lets the owner fade by as much as it would have gained, and has the
bucket when nothing is left there. Source: ADED, https://arxiv.org/abs/2407.12021, whose tables are dictionaries on the host.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SUCCESSORS = 12  # of a bigram
# Weight that a trigram gains each time that it is said, and the most that it can have. The source gives 0.04 in every round
# that a trigram is among the last 16 tokens, which are some five rounds.
GAIN, MOST = 0.2, 3.0
LEAST = 1 << 16  # buckets of a table that is to learn further texts
NOBODY = -1  # in place of the token before a text's first, and of the bigram of an empty bucket


class Trigrams(NamedTuple):
    """A table of H buckets with room for S successors each.

    bigram: `[H, 2]` whose bucket it is.
    tokens: `[H, S]` its successors, no two alike; weight: `[H, S]`, 0 where there is none.
    """

    bigram: Array
    tokens: Array
    weight: Array


def empty(buckets: int = LEAST) -> Trigrams:
    """A table that has learnt nothing."""
    slots = (buckets, SUCCESSORS)
    return Trigrams(jnp.full((buckets, 2), NOBODY, jnp.int32), jnp.zeros(slots, jnp.int32), jnp.zeros(slots))


def counted(texts: Iterable[Any], least: int = LEAST) -> Trigrams:
    """The table of finished texts, each a sequence of ids: shares of the successors of every bigram, the likeliest kept.

    Of two bigrams that want one bucket the more frequent has it.

    Args:
        least: buckets, a power of two, if twice the number of bigrams is not more.
    """
    rows = [np.lib.stride_tricks.sliding_window_view([NOBODY, *text], 3) for text in texts if len(text) > 1]
    every = np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)
    known, total = _shares(every.astype(np.int32))
    buckets = max(least, 1 << (2 * len(total) - 1).bit_length())
    rare_first = np.argsort(total, kind="stable")
    at = _bucket(known[0][rare_first], buckets)

    def put(values: np.ndarray, blank: int) -> Array:
        leaf = np.full((buckets, *values.shape[1:]), blank, values.dtype)
        leaf[at] = values[rare_first]  # of those that share a bucket the last stays
        return jnp.asarray(leaf)

    return Trigrams(*map(put, known, (NOBODY, 0, 0)))


def _shares(every: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Of trigrams `[n, 3]` the leaves of a table in which no two bigrams share a bucket, and how often each was met."""
    trigrams, count = np.unique(every, axis=0, return_counts=True)
    bigrams, begin, own = np.unique(trigrams[:, :2], axis=0, return_index=True, return_inverse=True)
    own = own.reshape(-1)  # ascending, as trigrams are
    total = np.bincount(own, count, len(bigrams))
    order = np.lexsort((-count, own))
    rank = np.arange(len(own)) - begin[own]
    kept, place = order[rank < SUCCESSORS], rank[rank < SUCCESSORS]
    tokens = np.zeros((len(bigrams), SUCCESSORS), np.int32)
    weight = np.zeros((len(bigrams), SUCCESSORS), np.float32)
    tokens[own[kept], place] = trigrams[kept, 2]
    weight[own[kept], place] = count[kept] / total[own[kept]]
    return (bigrams, tokens, weight), total


def learnt(table: Trigrams, text: Array, number: Array, *, gain: float = GAIN) -> Trigrams:
    """The table after the first `number` trigrams of `text [T]`, one after another."""

    def learn(table: Trigrams, at: Array) -> tuple[Trigrams, None]:
        bigram, token = jax.lax.dynamic_slice(text, (at,), (2,)), text[at + 2]
        bucket = _bucket(bigram, len(table.bigram))
        own = (table.bigram[bucket] == bigram).all()
        weight = jnp.where(own, table.weight[bucket], jnp.maximum(table.weight[bucket] - gain, 0.0))
        tokens, mine = table.tokens[bucket], own | ~weight.any()
        known = (table.tokens[bucket] == token) & (weight > 0)
        place = jnp.where(known.any(), jnp.argmax(known), jnp.argmin(weight))
        gained = jnp.minimum(jnp.where(known.any(), weight[place], 0.0) + gain, MOST)
        new = Trigrams(bigram, tokens.at[place].set(token), weight.at[place].set(gained))
        kept = Trigrams(table.bigram[bucket], tokens, weight)
        where = jnp.where(at < number, bucket, len(table.bigram))
        put = lambda leaf, new, kept: leaf.at[where].set(jnp.where(mine, new, kept), mode="drop")
        return jax.tree.map(put, table, new, kept), None

    return jax.lax.scan(learn, table, jnp.arange(text.shape[0] - 2))[0]


class Growing:
    """A table that learns finished texts between requests; `params` gives the newest, as a method's `drafter_params` does.

    What is drafted then depends on the texts before, and so does what p/q rejection samples; greedy and Gumbel text does not.
    """

    def __init__(self, table: Trigrams):
        self.table = table

    def saw(self, ids: Sequence[int]) -> None:
        """A text, prompt and answer, has ended."""
        text = np.full(max(32, 1 << len(ids).bit_length()), NOBODY, np.int32)  # one program for texts of like lengths
        text[1 : len(ids) + 1] = ids
        self.table = _learnt(self.table, text, np.int32(len(ids) - 1))

    def params(self, routes: Any) -> Trigrams:
        """The table, whatever the routes."""
        del routes
        return self.table


_learnt: Callable[..., Trigrams] = jax.jit(learnt)


def looked_up(table: Trigrams, bigram: Array) -> tuple[Array, Array]:
    """Successors of `bigram [2]` and their weights, both `[S]`; no weight where it is not known."""
    bucket = _bucket(bigram, len(table.bigram))
    own = (table.bigram[bucket] == bigram).all()
    return table.tokens[bucket], jnp.where(own, table.weight[bucket], 0.0)


def _bucket(bigram: Any, buckets: int) -> Any:
    """`bigram [..., 2]`, of numpy or JAX, -> `[...]`; evenly for neighbouring ids as well."""
    first, second = bigram[..., 0].astype(np.uint32), bigram[..., 1].astype(np.uint32)
    mixed = (first * np.uint32(0x9E3779B1) ^ second) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ mixed >> 15) * np.uint32(0xC2B2AE35)
    return ((mixed ^ mixed >> 16) % np.uint32(buckets)).astype(np.int32)
