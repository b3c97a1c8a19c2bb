"""Drafts a token tree with a language model: the likeliest continuations, level by level, in as many calls as it has levels.

The target scores all nodes in one call and what it says is walked down while it is a drafted child, so that more of a round
is kept than of a chain drafted in the same number of calls. Sources: SpecInfer, https://arxiv.org/abs/2305.09781, of token
trees and attention along them; EAGLE-2, https://arxiv.org/abs/2406.16858, of expanding a beam of the likeliest nodes and
verifying the likeliest of all that it met.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.attention import Attend, dense
from jaxspec.drafters.beam import Met, search, slots_of
from jaxspec.drafters.lm import LMDrafterParams, LMDrafterState, begin, model
from jaxspec.transformer import LMConfig, compact
from jaxspec.types import Draft, Drafter, Prompt


class TreeState(NamedTuple):
    """The model's state, and of each window row of the last draft the slot behind the text where it is cached, `[B, W]`."""

    model: LMDrafterState
    slot: Array


class Candidates(NamedTuple):
    """What a beam met, C of a row; the first is the text's last token, and no candidate stands before its parent.

    tokens: `[B, C]`, of which the first is none.
    score: `[B, C]` nats, by which they are preferred; no candidate has more than its parent.
    parent: `[B, C]` the candidate that each follows.
    slot: `[B, C]` slots behind the text: where those that were read are cached, 0 for the others.
    """

    tokens: Array
    score: Array
    parent: Array
    slot: Array


def tree_drafter(
    config: LMConfig,
    num_nodes: int,
    *,
    depth: int,
    beam: int = 8,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts the likeliest `num_nodes` nodes of at most `depth` levels; parameters are those of `lm_drafter`.

    The tree is deterministic, whatever a row samples: a node's children are its likeliest tokens, no two alike. So the rule
    lets the target draw its own next token and descends where that is a child: exact at every temperature, and a child is
    followed with the target's probability of it, so that the expected number of accepted tokens is the target's mass of the
    nodes. The chain of greedy drafting is always in it, so that no greedy round keeps less than of `depth` tokens in a chain;
    where rows draft fewer nodes these are the best, that chain first.

    Args:
        beam: nodes that are expanded on a level, and the children that each is given.
        vocab_size: the target's, where the two are padded differently.

    Raises:
        ValueError: the tree has fewer nodes than levels, or more than the beam meets.
    """
    cached = slots_of(num_nodes, depth, beam)

    def init(params: LMDrafterParams, prompt: Prompt, slots: int) -> TreeState:
        own = begin(config, params, prompt, slots + cached, dtype)
        return TreeState(own, jnp.zeros((prompt.length.shape[0], num_nodes + 1), jnp.int32))

    def propose(params: LMDrafterParams, state: TreeState, tokens, length, noise, sampling):
        del noise, sampling
        read, say = model(config, params, state.model.adapter, vocab_size=vocab_size, attend=attend)
        met, cache, _ = search(read, say, state.model.cache, tokens, length, depth=depth, beam=beam)
        draft, slot = likeliest(candidates(met._replace(score=greedy_first(met.score))), num_nodes)
        return draft, TreeState(state.model._replace(cache=cache), slot)

    def commit(params, state: TreeState, verdict, scores) -> TreeState:
        del params, scores
        own = state.model
        # Read nodes of the path go where their tokens went; its last node may be unread, which `opening` makes good.
        path = jnp.take_along_axis(state.slot, verdict.path[:, 1 : depth + 1], axis=1)
        cache = compact(own.cache, own.length, path)
        return state._replace(model=own._replace(cache=cache, length=own.length + verdict.num_emitted))

    return Drafter(num_nodes, init, propose, commit, depth)


def greedy_first(score: Array) -> Array:
    """Scores of what a beam met `[B, R + 1, beam]`, in which the greedy chain, the first child of each level, has the most."""
    beam = score.shape[2]
    number = (score.shape[1] - 1) // beam
    return score.at[:, jnp.array([0, *(1 + beam * level for level in range(number))]), 0].set(0.0)


def candidates(met: Met) -> Candidates:
    """All that a beam met, behind the root."""
    batch, _, beam = met.tokens.shape
    join = lambda root, rest: jnp.concatenate([jnp.full((batch, 1), root, rest.dtype), rest], axis=1)
    behind = lambda leaf, root: join(root, leaf.reshape(batch, -1))
    parent = join(0, jnp.repeat(join(0, 1 + met.read), beam, axis=1))
    slot = jnp.broadcast_to(jnp.arange(met.read.shape[1], dtype=jnp.int32), met.read.shape)
    return Candidates(
        tokens=behind(met.tokens, 0),
        score=behind(met.score, jnp.inf),
        parent=parent,
        slot=jnp.zeros_like(parent).at[jnp.arange(batch)[:, None], 1 + met.read].set(slot),
    )


def likeliest(found: Candidates, num_nodes: int) -> tuple[Draft, Array]:
    """The tree of the `num_nodes` candidates of most score, the best first, and the slot of each of its window rows."""
    best = pruned(found, num_nodes + 1)
    count = jnp.full(len(best.tokens), num_nodes, jnp.int32)
    return Draft(best.tokens[:, 1:], count, None, best.parent[:, 1:]), best.slot


def pruned(found: Candidates, number: int) -> Candidates:
    """So many of most score, the best first.

    Of equals the earlier is taken, so that a node's parent is among them and stands before it.
    """
    batch, all_of_them = found.tokens.shape
    _, order = jax.lax.top_k(found.score, number)
    row, of_each = jnp.arange(batch)[:, None], jnp.broadcast_to(jnp.arange(number), order.shape)
    rank = jnp.zeros((batch, all_of_them), jnp.int32).at[row, order].set(of_each.astype(jnp.int32))
    best = Candidates(*(jnp.take_along_axis(leaf, order, axis=1) for leaf in found))
    return best._replace(parent=jnp.take_along_axis(rank, best.parent, axis=1))
