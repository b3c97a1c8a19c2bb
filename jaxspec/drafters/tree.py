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
from jaxspec.drafters.lm import Branches, LMDrafterParams, LMDrafterState, begin, model, opening
from jaxspec.transformer import Cache, LMConfig, compact
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
    if not depth <= num_nodes <= met(depth, beam):
        raise ValueError(
            f"a tree of {num_nodes} nodes cannot be: {depth} levels need as many, and a beam of {beam} meets {met(depth, beam)}"
        )
    cached = (depth - 1) * beam

    def init(params: LMDrafterParams, prompt: Prompt, slots: int) -> TreeState:
        own = begin(config, params, prompt, slots + cached, dtype)
        return TreeState(own, jnp.zeros((prompt.length.shape[0], num_nodes + 1), jnp.int32))

    def propose(params: LMDrafterParams, state: TreeState, tokens, length, noise, sampling):
        del noise, sampling
        read, say = model(config, params, state.model.adapter, vocab_size=vocab_size, attend=attend)
        found, cache = search(read, say, state.model.cache, tokens, length, depth=depth, beam=beam)
        draft, slot = likeliest(found, num_nodes)
        return draft, TreeState(state.model._replace(cache=cache), slot)

    def commit(params, state: TreeState, verdict, scores) -> TreeState:
        del params, scores
        own = state.model
        # Read nodes of the path go where their tokens went; its last node may be unread, which `opening` makes good.
        path = jnp.take_along_axis(state.slot, verdict.path[:, 1 : depth + 1], axis=1)
        cache = compact(own.cache, own.length, path)
        return state._replace(model=own._replace(cache=cache, length=own.length + verdict.num_emitted))

    return Drafter(num_nodes, init, propose, commit, depth)


def met(depth: int, beam: int) -> int:
    """Nodes that a beam meets on so many levels."""
    return beam + (depth - 1) * beam**2


def search(read, say, cache: Cache, tokens: Array, length: Array, *, depth: int, beam: int) -> tuple[Candidates, Cache]:
    """Beam search behind the text: the root's likeliest tokens, and on each further level those of the likeliest nodes.

    The cache takes the nodes that are expanded in the slots right behind the text, level after level; `read` and `say` are
    those of `lm.chain`. The greedy chain is always expanded.
    """
    batch = length.shape[0]
    slots = max(depth - 1, 1) * beam  # one expansion is traced even where none is run
    level_of_slot = jnp.broadcast_to(jnp.arange(slots) // beam, (batch, slots))

    def expand(carry, level):
        cache, tokens, score, seen = carry
        seen = seen | (jnp.arange(slots) == level * beam + jnp.arange(beam)[:, None])
        branches = Branches(level_of_slot, seen, length)
        hidden, cache = read(cache, tokens, length + level * beam, branches)
        own, gain = _likeliest_tokens(say(hidden), beam)
        children, total = own.reshape(batch, -1), (score[..., None] + gain).reshape(batch, -1)
        _, chosen = jax.lax.top_k(_greedy_first(total), beam)
        of = lambda leaf, at: jnp.take_along_axis(leaf, at, axis=1)
        following = of(children, chosen), of(total, chosen), of(seen, chosen[..., None] // beam)
        return (cache, *following), (children, total, chosen)

    last, cache = opening(read, cache, tokens, length)
    first, gain = _likeliest_tokens(say(last), beam)
    start = cache, first, gain, jnp.zeros((batch, beam, slots), bool)
    (cache, *_), levels = jax.lax.scan(expand, start, jnp.arange(depth - 1))
    return _candidates(first, gain, levels), cache


def likeliest(found: Candidates, num_nodes: int) -> tuple[Draft, Array]:
    """The tree of the `num_nodes` candidates of most score, the best first, and the slot of each of its window rows.

    Of equals the earlier is taken, so that a node's parent is among them and stands before it.
    """
    batch, number = found.tokens.shape
    _, order = jax.lax.top_k(found.score, num_nodes + 1)
    row, of_each = jnp.arange(batch)[:, None], jnp.broadcast_to(jnp.arange(num_nodes + 1), order.shape)
    rank = jnp.zeros((batch, number), jnp.int32).at[row, order].set(of_each.astype(jnp.int32))
    of = lambda leaf: jnp.take_along_axis(leaf, order, axis=1)
    parents = jnp.take_along_axis(rank, of(found.parent), axis=1)
    count = jnp.full(batch, num_nodes, jnp.int32)
    return Draft(of(found.tokens)[:, 1:], count, None, parents[:, 1:]), of(found.slot)


def _likeliest_tokens(logits: Array, number: int) -> tuple[Array, Array]:
    """The likeliest tokens and their log probabilities: of the model itself, as the same tree serves rows of all settings."""
    best, tokens = jax.lax.top_k(logits, number)
    mass = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(jnp.int32), jnp.minimum(best - mass, 0.0)  # rounding must set no child above its parent


def _greedy_first(score: Array) -> Array:
    """Scores of a level in which the greedy chain, whose node is the first child of the first node, has the most."""
    return score.at[..., 0].set(0.0)


def _candidates(first: Array, gain: Array, levels: tuple[Array, Array, Array]) -> Candidates:
    """All that a beam met: the root, its children, and `levels` of children, scores and which of them were expanded next."""
    batch, beam = first.shape
    children, scores, chosen = (jnp.moveaxis(leaf, 0, 1) for leaf in levels)  # [B, levels, ...]
    number, each = children.shape[1:]
    join = lambda root, near, far: jnp.concatenate(
        [jnp.full((batch, 1), root, near.dtype), near, far.reshape(batch, -1)], axis=1
    )
    # Where each expanded node stands: all of the root's children, then those chosen of every level but the last.
    base = 1 + beam + each * jnp.arange(number)[:, None]
    near = jnp.broadcast_to(1 + jnp.arange(beam), (batch, 1, beam))
    expanded = jnp.concatenate([near, base + chosen], axis=1)[:, :number].reshape(batch, -1)
    slot = jnp.zeros((batch, 1 + beam + each * number), jnp.int32)
    place = jnp.broadcast_to(jnp.arange(number * beam, dtype=jnp.int32), expanded.shape)
    return Candidates(
        tokens=join(0, first, children),
        score=join(jnp.inf, _greedy_first(gain), _greedy_first(scores)),
        parent=join(0, jnp.zeros_like(first), jnp.repeat(expanded, beam, axis=1)),
        slot=slot.at[jnp.arange(batch)[:, None], expanded].set(place),
    )
