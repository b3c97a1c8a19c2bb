"""A cache of what may follow a text: a tree in layers, added to while the target verifies and corrected by its verdict.

Everything here is of one row, with static shapes; what reads the nodes with a model is `jaxspec.drafters.cached`. Source:
CARD, https://arxiv.org/abs/2508.04462.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

HIT, PARTIAL, MISS = range(3)
"""What a verdict finds: the emitted token is cached and so are descendants down to the last layer; the token is cached, and
its descendants end sooner; it is not cached."""


class Layers(NamedTuple):
    """M layers of W nodes; of layer 0 the first node is the text's last token, and the only one.

    tokens: `[M, W]`; parent: `[M, W]` the node of the layer before that each follows.
    gain: `[M, W]` nats of a token after its parent; weight: `[M, W]` their sum from layer 0 on, -inf where no node is.
    lead: `[M]` node of the chain that goes from each to its likeliest child, -1 where it has ended.
    children, gains: `[M, W, W]` likeliest tokens after each node of a layer that was read, the best first, and their nats.
    lineage: `[M, W]` the node of each layer that each node of the last descends from, or is.
    last: `[]` the deepest layer, which was not read yet.
    """

    tokens: Array
    parent: Array
    gain: Array
    weight: Array
    lead: Array
    children: Array
    gains: Array
    lineage: Array
    last: Array


class Correction(NamedTuple):
    """What a verdict leaves of a cache.

    layers: the cache, from the text's new last token on; outcome: `[]` one of HIT, PARTIAL, MISS.
    steps: `[M * W]` where what is to stand so many slots behind the old last token's stands before; node w of layer m does
        m * W + w behind, and the text is closed up.
    """

    layers: Layers
    outcome: Array
    steps: Array


def planted(token: Array, number: int, width: int) -> Layers:
    """`number` layers of `width` nodes with nothing in them but a text's last token."""
    zeros = lambda *shape, dtype=jnp.int32: jnp.zeros((number, width, *shape), dtype)
    nats = zeros(dtype=jnp.float32)
    return Layers(
        tokens=zeros().at[0, 0].set(token),
        parent=zeros(),
        gain=nats,
        weight=jnp.full_like(nats, -jnp.inf).at[0, 0].set(0.0),
        lead=jnp.full(number, -1, jnp.int32).at[0].set(0),
        children=zeros(width),
        gains=zeros(width, dtype=jnp.float32),
        lineage=zeros().at[0].set(jnp.arange(width)),
        last=jnp.int32(0),
    )


def chain(layers: Layers, number: int) -> tuple[Array, Array]:
    """The query: the tokens `[number]` from likeliest child to likeliest child, and how many of them there are."""
    lead = layers.lead[1 : number + 1]
    tokens = jnp.take_along_axis(layers.tokens[1 : number + 1], jnp.maximum(lead, 0)[:, None], axis=1)[:, 0]
    return tokens, jnp.sum(lead >= 0, dtype=jnp.int32)


def visible(layers: Layers) -> Array:
    """`[W, M * W]` whether each node of the last layer is, or descends from, each node."""
    number, width = layers.tokens.shape
    own = jax.nn.one_hot(layers.lineage.T, width, dtype=bool) & (jnp.arange(number) <= layers.last)[:, None]
    return own.reshape(width, -1)


def grown(layers: Layers, children: Array, gains: Array) -> Layers:
    """The cache with one layer more, the best W of the last one's children; as it was where it has all its layers.

    The likeliest child of the chain's end is always among them, so that the chain goes on as greedy drafting would.

    Args:
        children, gains: `[W, W]` of the last layer's nodes, see `Layers`.
    """
    number, width = layers.tokens.shape
    total = layers.weight[layers.last][:, None] + gains
    lead = layers.lead[layers.last]
    heir = (jnp.arange(width) == lead)[:, None] & (jnp.arange(width) == 0)
    _, chosen = jax.lax.top_k(jnp.where(heir, jnp.inf, total).reshape(-1), width)
    parent = chosen // width
    room = layers.last + 1 < number
    read, new = jnp.where(room, layers.last, number), layers.last + 1  # what lies behind the end is dropped
    put = lambda leaf, at, value: leaf.at[at].set(value, mode="drop")
    of = lambda leaf: leaf.reshape(-1)[chosen]
    lineage = put(layers.lineage[:, parent], new, jnp.arange(width))
    return Layers(
        tokens=put(layers.tokens, new, of(children)),
        parent=put(layers.parent, new, parent),
        gain=put(layers.gain, new, of(gains)),
        weight=put(layers.weight, new, of(total)),
        lead=put(layers.lead, new, jnp.where(lead >= 0, 0, -1)),
        children=put(layers.children, read, children),
        gains=put(layers.gains, read, gains),
        lineage=jnp.where(room, lineage, layers.lineage),
        last=jnp.where(room, new, layers.last),
    )


def corrected(layers: Layers, tokens: Array, number: Array) -> Correction:
    """The cache after the text went on with the first `number []` of `tokens [T]`, T being less than M.

    Nodes that do not descend from the new last token are dropped. The deepest layer with descendants that was read is
    followed by the best of the children that it was read with, the second level of the cache: where the next layer
    survived, its nodes are among these; where it did not, it is filled again without reading anything.
    """
    size, width = layers.tokens.shape
    path, cached = _follow(layers, tokens, number)
    node = path[number]
    kept, depth = _descendants(layers, node, number)
    known = kept.last < layers.last - number
    own = grown(kept, kept.children[kept.last], kept.gains[kept.last])
    fresh = planted(tokens[jnp.maximum(number - 1, 0)], size, width)
    following = jax.tree.map(lambda *ways: jnp.where(cached, jnp.where(known, *ways[:2]), ways[2]), own, kept, fresh)
    outcome = jnp.where(depth < layers.last - number, PARTIAL, HIT)
    slot = jnp.arange(size * width)
    of_path = slot * width + path[jnp.minimum(slot, len(tokens))]
    steps = jnp.where(slot <= number, of_path, number * width + slot - number)
    return Correction(following, jnp.where(cached, outcome, MISS), jnp.minimum(steps, size * width - 1))


def _follow(layers: Layers, tokens: Array, number: Array) -> tuple[Array, Array]:
    """`[T + 1]` the nodes along the first `number` tokens, of layer 0 the first, and whether all of them are cached."""

    def descend(carry, layer):
        node, cached = carry
        token, counts, own, parent, weight = layer
        child = (own == token) & (parent == node) & (weight > -jnp.inf)
        node = jnp.where(counts & child.any(), jnp.argmax(child).astype(jnp.int32), node)
        return (node, cached & (child.any() | ~counts)), node

    below = [leaf[1 : len(tokens) + 1] for leaf in (layers.tokens, layers.parent, layers.weight)]
    start = jnp.int32(0), jnp.bool_(True)
    (_, cached), nodes = jax.lax.scan(descend, start, (tokens, jnp.arange(len(tokens)) < number, *below))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), nodes]), cached


def _descendants(layers: Layers, node: Array, depth: Array) -> tuple[Layers, Array]:
    """The cache below a node of layer `depth`, down to the deepest layer with descendants that was read; and how deep
    descendants go, read or not."""
    size, width = layers.tokens.shape
    index = jnp.arange(size)
    shifted = jax.tree.map(lambda leaf: leaf[jnp.minimum(index + depth, size - 1)], layers._replace(last=index))
    there = index <= layers.last - depth

    def weigh(carry, layer):
        above, lead = carry
        parent, gain, before, there = layer
        weight = jnp.where(there & (before > -jnp.inf), above[parent] + gain, -jnp.inf)
        heir = jnp.where(parent == lead, weight, -jnp.inf)
        lead = jnp.where(heir.max() > -jnp.inf, jnp.argmax(heir).astype(jnp.int32), -1)
        return (weight, lead), (weight, lead)

    root = jnp.where(jnp.arange(width) == node, 0.0, -jnp.inf)
    below = jax.tree.map(lambda leaf: leaf[1:], (shifted.parent, shifted.gain, shifted.weight, there))
    _, (weight, lead) = jax.lax.scan(weigh, (root, node), below)
    deepest = jnp.sum((weight > -jnp.inf).any(1), dtype=jnp.int32)
    last = jnp.minimum(deepest, jnp.maximum(layers.last - depth - 1, 0))

    first = lambda leaf: leaf.at[0].set(leaf[0, node])
    parent = shifted.parent.at[1].set(0)
    whole = jnp.concatenate([jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)[None], weight])
    lead = jnp.concatenate([jnp.zeros(1, jnp.int32), lead])
    kept = Layers(
        tokens=first(shifted.tokens),
        parent=parent,
        gain=shifted.gain,
        weight=jnp.where((index <= last)[:, None], whole, -jnp.inf),
        lead=jnp.where(index <= last, lead, -1),
        children=first(shifted.children),
        gains=first(shifted.gains),
        lineage=_lineage(parent, last),
        last=last,
    )
    return kept, deepest


def _lineage(parent: Array, last: Array) -> Array:
    """`lineage` of `Layers`, from the nodes of layer `last` up."""

    def climb(node, layer):
        own, index = layer
        return jnp.where((index <= last) & (index > 0), own[node], node), node

    size, width = parent.shape
    return jax.lax.scan(climb, jnp.arange(width), (parent, jnp.arange(size)), reverse=True)[1]
