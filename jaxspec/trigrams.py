"""Trigram tables of a fixed shape: what follows two tokens, and with what weight; they learn as texts go on.

A bigram is hashed to one bucket, which it must own to be known. Whatever is learnt gains weight; what it meets in its place
fades by as much, a successor by giving way to a new one where it is the least of twelve, a bigram whose bucket another one
wants when nothing is left of it. Source: ADED, https://arxiv.org/abs/2407.12021, whose tables are dictionaries on the host.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SUCCESSORS = 12  # of a bigram
GAIN, MOST = 0.04, 3.0  # weight that a trigram gains each time that it is met, and the most that it can have
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
    trigrams, count = np.unique(every, axis=0, return_counts=True)
    bigrams, begin, own = np.unique(trigrams[:, :2], axis=0, return_index=True, return_inverse=True)
    own = own.reshape(-1)
    order = np.lexsort((-count, own))
    rank = np.arange(len(order)) - begin[own]  # sorted within a bigram, which stands where it stood
    total = np.bincount(own, count, len(bigrams))
    kept, place = order[rank < SUCCESSORS], rank[rank < SUCCESSORS]
    tokens = np.zeros((len(bigrams), SUCCESSORS), np.int32)
    weight = np.zeros((len(bigrams), SUCCESSORS), np.float32)
    tokens[own[kept], place] = trigrams[kept, 2]
    weight[own[kept], place] = count[kept] / total[own[kept]]
    table = jax.tree.map(np.array, empty(max(least, 1 << (2 * len(bigrams)).bit_length())))
    rare_first = np.argsort(total, kind="stable")
    at = np.asarray(_bucket(jnp.asarray(bigrams[rare_first], jnp.int32), len(table.bigram)))
    for leaf, values in zip(table, (bigrams, tokens, weight), strict=True):
        leaf[at] = values[rare_first]  # of those that share a bucket the last stays
    return jax.tree.map(jnp.asarray, table)


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


def looked_up(table: Trigrams, bigram: Array) -> tuple[Array, Array]:
    """Successors of `bigram [2]` and their weights, both `[S]`; no weight where it is not known."""
    bucket = _bucket(bigram, len(table.bigram))
    own = (table.bigram[bucket] == bigram).all()
    return table.tokens[bucket], jnp.where(own, table.weight[bucket], 0.0)


def _bucket(bigram: Array, buckets: int) -> Array:
    """`bigram [..., 2]` -> `[...]`, evenly for neighbouring ids as well."""
    first, second = bigram[..., 0].astype(jnp.uint32), bigram[..., 1].astype(jnp.uint32)
    mixed = (first * jnp.uint32(0x9E3779B1) ^ second) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ mixed >> 15) * jnp.uint32(0xC2B2AE35)
    return ((mixed ^ mixed >> 16) % jnp.uint32(buckets)).astype(jnp.int32)
