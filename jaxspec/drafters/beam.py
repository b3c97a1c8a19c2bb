"""What a language model finds likely behind a text: a beam of nodes that is expanded level by level, a call a level.

Source: EAGLE-2, https://arxiv.org/abs/2406.16858, of expanding the likeliest nodes and keeping all that they led to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.drafters.lm import Branches, opening
from jaxspec.transformer import Cache


class Met(NamedTuple):
    """What a beam met: children of the text's last token, and of the R nodes that were read, `beam` of each.

    tokens: `[B, R + 1, beam]`, the last token's first, then those of each slot behind the text in turn.
    score: `[B, R + 1, beam]` nats, the log probability of all that leads from the text to there.
    read: `[B, R]` which child stands in each slot, counted over all of them.
    """

    tokens: Array
    score: Array
    read: Array


def met(depth: int, beam: int) -> int:
    """Nodes that a beam meets on so many levels."""
    return beam + (depth - 1) * beam**2


def slots_of(num_nodes: int, depth: int, beam: int) -> int:
    """Slots behind the text that a beam's nodes are cached in; ValueError if it cannot give a tree of so many nodes.

    The tree has fewer nodes than levels, or more than the beam meets.
    """
    if not depth <= num_nodes <= met(depth, beam):
        raise ValueError(
            f"a tree of {num_nodes} nodes cannot be: {depth} levels need as many, and a beam of {beam} meets {met(depth, beam)}"
        )
    return (depth - 1) * beam


def by_score(memory: Any, level: Array, tokens: Array, children: Array, score: Array, seen: Array) -> tuple[Array, Any]:
    """The children of a level that are read next, `[B, beam]` of all counted through: the greedy chain's, and the likeliest.

    Args:
        memory: what is kept from level to level; here nothing.
        level: which, from 0; tokens: `[B, beam]` its nodes, which were read.
        children, score: `[B, beam, beam]` their children, of which the very first goes on with the greedy chain.
        seen: `[B, beam, R]` slots of each node and of those above it.
    """
    del level, tokens, children, seen
    preferred = score.at[:, 0, 0].set(0.0)
    return jax.lax.top_k(preferred.reshape(len(score), -1), score.shape[1])[1], memory


def search(
    read: Callable,
    say: Callable,
    cache: Cache,
    tokens: Array,
    length: Array,
    *,
    depth: int,
    beam: int,
    columns: int = 2,
    choose: Callable = by_score,
    memory: Any = (),
) -> tuple[Met, Cache, Any]:
    """Beam search behind the text: the root's likeliest tokens, and on each further level those of the likeliest nodes.

    The cache takes the nodes that are expanded in the slots right behind the text, level after level; `read` and `say` are
    those of `lm.chain`. The greedy chain is always expanded.

    Args:
        columns: of the text's end, read first, see `lm.opening`.
        choose: which children are read next, as `by_score`; memory: what it starts from.

    Returns:
        What was met, the cache, and the memory of `choose`.
    """
    batch = length.shape[0]
    slots = max(depth - 1, 1) * beam  # one expansion is traced even where none is run
    level_of_slot = jnp.broadcast_to(jnp.arange(slots) // beam, (batch, slots))

    def expand(carry, level):
        cache, tokens, score, seen, memory = carry
        seen = seen | (jnp.arange(slots) == level * beam + jnp.arange(beam)[:, None])
        branches = Branches(level_of_slot, seen, length)
        hidden, cache = read(cache, tokens, length + level * beam, branches)
        own, gain = likeliest_tokens(say(hidden), beam)
        total = score[..., None] + gain
        chosen, memory = choose(memory, level, tokens, own, total, seen)
        of = lambda leaf, at: jnp.take_along_axis(leaf, at, axis=1)
        flat = lambda leaf: leaf.reshape(batch, -1)
        following = of(flat(own), chosen), of(flat(total), chosen), of(seen, chosen[..., None] // beam)
        return (cache, *following, memory), (own, total, chosen)

    last, cache = opening(read, cache, tokens, length, columns)
    first, gain = likeliest_tokens(say(last), beam)
    start = cache, first, gain, jnp.zeros((batch, beam, slots), bool), memory
    (cache, *_, memory), levels = jax.lax.scan(expand, start, jnp.arange(depth - 1))
    return gathered(first, gain, levels), cache, memory


def likeliest_tokens(logits: Array, number: int) -> tuple[Array, Array]:
    """The likeliest tokens and their log probabilities: of the model itself, as the same tree serves rows of all settings."""
    best, tokens = jax.lax.top_k(logits, number)
    mass = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(jnp.int32), jnp.minimum(best - mass, 0.0)  # rounding must set no child above its parent


def gathered(first: Array, gain: Array, levels: tuple[Array, Array, Array]) -> Met:
    """Of the root's children, and `levels` of children, scores and which of them were expanded next."""
    batch, beam = first.shape
    children, scores, chosen = (jnp.moveaxis(leaf, 0, 1) for leaf in levels)  # [B, levels, ...]
    number = chosen.shape[1]
    join = lambda near, far: jnp.concatenate([near[:, None], far.reshape(batch, -1, beam)], axis=1)
    # All of the root's children were read, then those chosen of every level but the last.
    base = beam + beam**2 * jnp.arange(number)[:, None]
    near = jnp.broadcast_to(jnp.arange(beam), (batch, 1, beam))
    read = jnp.concatenate([near, base + chosen], axis=1)[:, :number].reshape(batch, -1)
    return Met(join(first, children), join(gain, scores), read.astype(jnp.int32))
