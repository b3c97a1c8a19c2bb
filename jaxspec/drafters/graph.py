"""Drafts a token graph: of nodes that end in the same tokens one is read, and the others go on as it does.

While a beam is expanded, a node that shares its token and those of its r ancestors with a node already met is not read
again, so that the calls reach further. The graph is unrolled to a tree, in which what was drafted once stands behind each
of the texts that lead to it, and verified as any tree. Source: Graph-Structured Speculative Decoding,
https://arxiv.org/abs/2407.16207, with its exact matching; its other way, which accepts by p/q along every path and draws
nothing from what is left of p, is not lossless.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.ancestry import ancestry
from jaxspec.attention import Attend, dense
from jaxspec.drafters.beam import Met, by_score, search, slots_of
from jaxspec.drafters.lm import LMDrafterParams, LMDrafterState, begin, model
from jaxspec.drafters.tree import Candidates, pruned
from jaxspec.transformer import Cache, LMConfig
from jaxspec.types import Draft, Drafter, Prompt

NONE = -1  # no token, and no node


class GraphState(NamedTuple):
    """The model's state, and which window rows of the last draft stand behind a merged edge, `[B, W]`."""

    model: LMDrafterState
    merged: Array


class Grams(NamedTuple):
    """Tokens that nodes are known by, their own and then those of their r ancestors, the nearest first.

    above: `[B, beam, r]` of the ancestors of the nodes that are read next.
    read: `[B, R, r + 1]` of the node in each slot, NONE where none is yet.
    """

    above: Array
    read: Array


class Graph(NamedTuple):
    """Edges, `beam` of each of the R + 1 nodes that have continuations, of which the first is the text's last token.

    tokens: `[B, R + 1, beam]`; gain: nats, log probability of each after the text that its node was read behind.
    follows: node whose continuations follow, NONE for a leaf; merged: whether that one was read behind another text.
    """

    tokens: Array
    gain: Array
    follows: Array
    merged: Array


class Tree(NamedTuple):
    """A tree as it is unrolled, the W best nodes so far, as window rows.

    tokens, score, parent: `[B, W]` as of `tree.Candidates`, with the score of every node.
    follows: `[B, W]` node of the graph whose continuations are still to be hung on, NONE if there are none.
    merged: `[B, W]` whether these stand behind a merged edge.
    """

    tokens: Array
    score: Array
    parent: Array
    follows: Array
    merged: Array


def graph_drafter(
    config: LMConfig,
    num_nodes: int,
    *,
    depth: int,
    beam: int = 8,
    ancestors: int = 1,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts the likeliest `num_nodes` nodes of the unrolled graph; parameters and cache are those of `lm_drafter`.

    As `tree_drafter`, and exact for its reason; `depth` is the number of calls, behind a merged edge paths are longer. A node
    that is reused was read behind another text, so that the round after begins by reading what was accepted, in a window as
    wide as a round can emit, and commit only counts.

    Args:
        ancestors: r, whose tokens nodes must share beside their own; 0 merges by the token alone.
        vocab_size: the target's, where the two are padded differently.

    Raises:
        ValueError: the tree has fewer nodes than levels, or more than the beam meets.
    """
    cached = slots_of(num_nodes, depth, beam)

    def init(params: LMDrafterParams, prompt: Prompt, slots: int) -> GraphState:
        own = begin(config, params, prompt, slots + cached, dtype)
        return GraphState(own, jnp.zeros((prompt.length.shape[0], num_nodes + 1), bool))

    def propose(params: LMDrafterParams, state: GraphState, tokens, length, noise, sampling):
        del noise, sampling
        read, say = model(config, params, state.model.adapter, vocab_size=vocab_size, attend=attend)
        with_model = partial(search, read, say, state.model.cache, tokens, length, columns=num_nodes + 1)
        graph, cache = explore(with_model, tokens, length, depth=depth, beam=beam, ancestors=ancestors)
        draft, merged = unroll(graph, num_nodes, depth)
        return draft, GraphState(state.model._replace(cache=cache), merged)

    def commit(params, state: GraphState, verdict, scores) -> GraphState:
        del params, scores
        own = state.model
        return state._replace(model=own._replace(length=own.length + verdict.num_emitted))

    return Drafter(num_nodes, init, propose, commit, depth)


def explore(
    search: Callable, tokens: Array, length: Array, *, depth: int, beam: int, ancestors: int
) -> tuple[Graph, Cache]:
    """The graph that a beam meets behind the text, and the cache; `search` is `beam.search` of a model and a text."""
    batch, slots = length.shape[0], max(depth - 1, 1) * beam
    place = length[:, None] - 1 - jnp.arange(ancestors)
    text = jnp.where(place < 0, NONE, jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1))
    above = jnp.broadcast_to(text[:, None], (batch, beam, ancestors))
    nothing = Grams(above, jnp.full((batch, slots, ancestors + 1), NONE, jnp.int32))
    met, cache, grams = search(depth=depth, beam=beam, choose=once_each, memory=nothing)
    return linked(met, text, grams.read[:, : met.read.shape[1]]), cache


def once_each(
    memory: Grams, level: Array, tokens: Array, children: Array, score: Array, seen: Array
) -> tuple[Array, Grams]:
    """As `beam.by_score`, of children that end as no node that was read, nor as a likelier child of the level."""
    batch, beam = tokens.shape
    own = jnp.concatenate([tokens[..., None], memory.above], axis=-1)
    read = jax.lax.dynamic_update_slice_in_dim(memory.read, own, level * beam, axis=1)
    above = own[..., : memory.above.shape[-1]]
    grams = behind(children, above).reshape(batch, beam**2, -1)
    known = (same(grams, read) & ~jnp.repeat(seen, beam, axis=1)).any(-1)
    known = known.at[:, 0].set(False)  # the greedy chain is read in any case
    preferred = score.at[:, 0, 0].set(0.0).reshape(batch, -1)
    rank = jnp.argsort(jnp.argsort(-preferred, axis=-1), axis=-1)
    likelier = (rank[:, None] < rank[:, :, None]) & ~known[:, None]
    twice = (same(grams, grams) & likelier).any(-1)
    new = jnp.where((known | twice).reshape(score.shape), -jnp.inf, score)
    chosen, _ = by_score((), level, tokens, children, new, seen)
    return chosen, Grams(jnp.take_along_axis(above, chosen[..., None] // beam, axis=1), read)


def linked(met: Met, text: Array, read: Array) -> Graph:
    """The graph of what was met: each node is followed by its own continuations, or by those of the first that ends as it does.

    Args:
        text: `[B, r]` the text's last tokens, the last first; read: `[B, R, r + 1]` as in `Grams`.
    """
    batch, number, beam = met.tokens.shape
    above = jnp.concatenate([text[:, None], read[..., : text.shape[1]]], axis=1)
    grams = behind(met.tokens, above).reshape(batch, number * beam, -1)
    on_the_way = ancestry(met.read // beam)[..., 1:]
    alike = same(grams, read) & ~jnp.repeat(on_the_way, beam, axis=1)
    node = jnp.arange(1, number, dtype=jnp.int32)
    first = jnp.min(jnp.where(alike, node, number), axis=-1, initial=number)
    row = jnp.arange(batch)[:, None]
    own = jnp.full((batch, number * beam), NONE, jnp.int32).at[row, met.read].set(node)
    merged = (own == NONE) & (first < number)
    root = jnp.zeros((batch, 1), met.score.dtype)
    score = jnp.concatenate([root, jnp.take_along_axis(met.score.reshape(batch, -1), met.read, axis=1)], axis=1)
    as_edges = lambda leaf: leaf.reshape(met.tokens.shape)
    return Graph(met.tokens, met.score - score[..., None], as_edges(jnp.where(merged, first, own)), as_edges(merged))


def unroll(graph: Graph, num_nodes: int, depth: int) -> tuple[Draft, Array]:
    """The tree of the `num_nodes` likeliest nodes on the graph's paths, and which window rows stand behind a merged edge.

    No node is likelier than its parent, so that the best of each level, hung on the best so far, are the best of all. The
    greedy chain of `depth` tokens comes first.
    """
    batch = len(graph.tokens)
    none = jnp.zeros((batch, num_nodes + 1), jnp.int32)
    root = none.at[:, 0].set(1) > 0
    start = Tree(none, jnp.where(root, 0.0, -jnp.inf), none, jnp.where(root, 0, NONE), none > 0)
    unfinished = lambda carry: (carry[1].follows != NONE).any()
    grow = lambda carry: (carry[0] + 1, _grown(graph, carry[1], carry[0], depth))
    _, tree = jax.lax.while_loop(unfinished, grow, (0, start))
    count = jnp.full(batch, num_nodes, jnp.int32)
    draft = Draft(tree.tokens[:, 1:], count, None, tree.parent[:, 1:])
    return draft, jnp.take_along_axis(tree.merged, tree.parent, axis=1)


def _grown(graph: Graph, tree: Tree, level: Array, depth: int) -> Tree:
    """The best of the tree and of what hangs on the nodes that `level` tokens lead to."""
    batch, width = tree.tokens.shape
    beam, opened = graph.tokens.shape[2], (tree.follows != NONE)[..., None]
    of = lambda leaf: jnp.take_along_axis(leaf, jnp.maximum(tree.follows, 0)[..., None], axis=1)
    join = lambda old, new: jnp.concatenate([old, new.reshape(batch, -1)], axis=1)
    row = jnp.broadcast_to(jnp.arange(width)[:, None], (batch, width, beam))
    tokens, parent = join(tree.tokens, of(graph.tokens)), join(tree.parent, row)
    score = join(tree.score, jnp.where(opened, tree.score[..., None] + of(graph.gain), -jnp.inf))
    follows = join(jnp.full_like(tree.follows, NONE), jnp.where(opened, of(graph.follows), NONE))
    merged = join(tree.merged, tree.merged[..., None] | of(graph.merged))
    index = jnp.broadcast_to(jnp.arange(width * (1 + beam)), parent.shape)
    # The greedy chain has been put first, and goes on with the first child of its last node.
    greedy = (index <= jnp.minimum(level, depth)) | ((index == width + level * beam) & (level < depth))
    best = pruned(Candidates(tokens, jnp.where(greedy, jnp.inf, score), parent, index), width)
    score, follows, merged = (jnp.take_along_axis(leaf, best.slot, axis=1) for leaf in (score, follows, merged))
    return Tree(best.tokens, score, best.parent, follows, merged)


def behind(tokens: Array, above: Array) -> Array:
    """`[B, n, beam, r + 1]` what children `tokens [B, n, beam]` are known by, behind `above [B, n, r]`."""
    rest = jnp.broadcast_to(above[:, :, None], (*tokens.shape, above.shape[-1]))
    return jnp.concatenate([tokens[..., None], rest], axis=-1)


def same(grams: Array, others: Array) -> Array:
    """`[B, n, m]` which of `grams [B, n, r + 1]` equal which of `others [B, m, r + 1]`."""
    return (grams[:, :, None] == others[:, None]).all(-1)
