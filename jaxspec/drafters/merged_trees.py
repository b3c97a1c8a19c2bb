"""Drafts the trees of two language models as one: what both find likely stands in it once.

Where it is not known which of two drafters knows a text, both draft, and the likeliest nodes of both are verified in one
target call. Source: TAPS, https://arxiv.org/abs/2603.27027, whose merged trees stand side by side under one root; here paths
that they share become one, and no more nodes are verified than of one tree.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxspec.attention import Attend, dense
from jaxspec.drafters.beam import met, search, slots_of
from jaxspec.drafters.lm import LMDrafterParams, LMDrafterState, begin, model
from jaxspec.drafters.tree import Candidates, candidates, likeliest
from jaxspec.transformer import LMConfig
from jaxspec.types import Drafter, Prompt


class TwoDrafters(NamedTuple):
    """Parameters of two of `lm_drafter`.

    routes: `[R, 2]` what each route is to the first and to the second, so that rows may have different pairs; None where it is
    the same to both.
    """

    first: LMDrafterParams
    second: LMDrafterParams
    routes: Array | None = None


def merged_tree_drafter(
    config: LMConfig,
    num_nodes: int,
    *,
    depth: int,
    beam: int = 8,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts the likeliest `num_nodes` nodes of two models' trees; parameters are `TwoDrafters`.

    As `tree_drafter`, and exact for its reason, in twice its calls. A node is as likely as the two models find it on
    average, half of what one of them says where the other has not met it. The first model's greedy chain is always there.
    A path that was accepted may be the other model's, so that each begins the round after by reading what was accepted, in
    a window as wide as a round can emit, and commit only counts.

    Args:
        vocab_size: the target's, where the two are padded differently.

    Raises:
        ValueError: the tree has fewer nodes than levels, or more than one beam meets.
    """
    cached = slots_of(num_nodes, depth, beam)

    def init(params: TwoDrafters, prompt: Prompt, slots: int) -> tuple[LMDrafterState, ...]:
        pair = jnp.stack([prompt.route] * 2, axis=1) if params.routes is None else params.routes[prompt.route]
        own = zip(params[:2], pair.T, strict=True)
        return tuple(begin(config, one, prompt._replace(route=route), slots + cached, dtype) for one, route in own)

    def grow(params: LMDrafterParams, state: LMDrafterState, tokens: Array, length: Array):
        read, say = model(config, params, state.adapter, vocab_size=vocab_size, attend=attend)
        found, cache, _ = search(read, say, state.cache, tokens, length, depth=depth, beam=beam, columns=depth + 1)
        return candidates(found), state._replace(cache=cache)

    def propose(params: TwoDrafters, states: tuple[LMDrafterState, ...], tokens, length, noise, sampling):
        del noise, sampling
        (one, first), (other, second) = (grow(*own, tokens, length) for own in zip(params[:2], states, strict=True))
        draft, _ = likeliest(united(one, other, levels(depth, beam)), num_nodes)
        return draft, (first, second)

    def commit(params, states: tuple[LMDrafterState, ...], verdict, scores) -> tuple[LMDrafterState, ...]:
        del params, scores
        return tuple(own._replace(length=own.length + verdict.num_emitted) for own in states)

    return Drafter(num_nodes, init, propose, commit, 2 * depth)


def levels(depth: int, beam: int) -> list[tuple[int, int]]:
    """Candidates of each level of a beam, from the first, which is the greedy chain's, to the one behind the last."""
    return list(itertools.pairwise([1, *(1 + met(level, beam) for level in range(1, depth + 1))]))


def united(one: Candidates, other: Candidates, levels: list[tuple[int, int]]) -> Candidates:
    """Two trees under one root: all of the first, and behind it the second, whose nodes that the first has too score nothing.

    The first's greedy chain has the most.

    Args:
        levels: where each level stands in both.
    """
    number = one.tokens.shape[1]
    row = jnp.arange(len(one.tokens))[:, None]
    twin = twins(one, other, levels)
    again = jnp.full_like(one.score, -jnp.inf).at[row, twin].set(other.score, mode="drop")
    score = jnp.logaddexp(one.score, again)
    for start, stop in levels:  # rounding must set no node above its parent
        above = jnp.take_along_axis(score, one.parent[:, start:stop], axis=1)
        score = score.at[:, start:stop].min(above)
    score = score - jnp.log(2.0)
    score = score.at[:, jnp.array([0, *(start for start, _ in levels)])].set(jnp.inf)
    alone = jnp.where(twin < number, -jnp.inf, other.score - jnp.log(2.0))
    above = jnp.take_along_axis(twin, other.parent, axis=1)
    join = lambda first, second: jnp.concatenate([first, second], axis=1)
    return Candidates(
        tokens=join(one.tokens, other.tokens),
        score=join(score, alone),
        parent=join(one.parent, jnp.where(above < number, above, number + other.parent)),
        slot=join(one.slot, other.slot),
    )


def twins(one: Candidates, other: Candidates, levels: list[tuple[int, int]]) -> Array:
    """`[B, C]` the candidate of `one` behind the same tokens as each of `other`'s, C where there is none."""
    number = one.tokens.shape[1]
    twin = jnp.full_like(other.parent, number).at[:, 0].set(0)
    for start, stop in levels:
        part = slice(start, stop)
        parent = jnp.take_along_axis(twin, other.parent[:, part], axis=1)
        alike = other.tokens[:, part, None] == one.tokens[:, None, part]
        alike = alike & (parent[..., None] == one.parent[:, None, part])
        twin = twin.at[:, part].set(jnp.where(alike.any(-1), start + jnp.argmax(alike, axis=-1), number))
    return twin
