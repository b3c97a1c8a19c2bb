"""Drafts token trees from trigram tables that learn as they decode; no weights, and an empty table will do to begin with.

A shared table knows earlier texts and is only read; what a row says goes into a small one of its own, so that rows do not see
one another and what a text teaches the others is folded into the shared one between requests, by the host. Source: ADED,
https://arxiv.org/abs/2407.12021, whose search is Monte Carlo; a beam finds the likeliest nodes of a table without drawing. (Its
released code scores a step by the first token of the next bigram, which is always the one at hand, so that its rewards are
the same for every path; here a node's score is that of the tokens that lead to it.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.drafters.beam import gathered, slots_of
from jaxspec.drafters.tree import Candidates, candidates, likeliest
from jaxspec.trigrams import GAIN, NOBODY, SUCCESSORS, Trigrams, empty, learnt, looked_up
from jaxspec.types import Draft, Drafter, Prompt

BUCKETS = 1 << 10  # of a row's own table
UNSEEN = GAIN  # weight of all that has not followed a bigram yet
WIDEST = 2 * SUCCESSORS  # what two tables know of a bigram


class AdaptiveState(NamedTuple):
    """The rows' own tables `[B, ...]`, and the last two tokens of each row, `[B, 2]`."""

    own: Trigrams
    last: Array


def adaptive_drafter(
    num_nodes: int, *, depth: int = 4, beam: int = 4, buckets: int = BUCKETS, gain: float = GAIN
) -> Drafter:
    """Drafts the likeliest `num_nodes` nodes of at most `depth` levels, fewer where the tables know no more.

    Its parameters are a table, `jaxspec.trigrams.Trigrams`. The tree is deterministic, see `tree_drafter`.

    Args:
        beam: nodes that are expanded on a level, and the children that each is given.
        buckets: of a row's own table, which learns the prompt and the text.
        gain: what a trigram of them gains each time; 0 learns nothing.

    Raises:
        ValueError: the tree has fewer nodes than levels, or more than the beam meets; a beam wider than the tables.
    """
    slots_of(num_nodes, depth, beam)
    if beam > WIDEST:
        raise ValueError(
            f"a beam of {beam} is wider than two tables, which know {WIDEST} successors of a bigram at most"
        )
    learn = jax.vmap(lambda own, text, number: learnt(own, text, number, gain=gain))
    ends = jax.vmap(lambda text, at: jax.lax.dynamic_slice(text, (at,), (2,)))

    def init(params: Trigrams, prompt: Prompt, slots: int) -> AdaptiveState:
        del params, slots
        text = jnp.pad(prompt.tokens.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=NOBODY)
        fresh = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(text), *leaf.shape)), empty(buckets))
        return AdaptiveState(learn(fresh, text, prompt.length - 1), ends(text, prompt.length - 1))

    def propose(params: Trigrams, state: AdaptiveState, tokens, length, noise, sampling) -> tuple[Draft, AdaptiveState]:
        del tokens, length, noise, sampling
        found = search(params, state, depth=depth, beam=beam)
        draft, _ = likeliest(found, num_nodes)
        known = jnp.isfinite(found.score[:, 1:]).sum(1, dtype=jnp.int32)
        return draft._replace(num_drafted=jnp.minimum(draft.num_drafted, known)), state

    def commit(params, state: AdaptiveState, verdict, scores) -> AdaptiveState:
        del params, scores
        text = jnp.concatenate([state.last, verdict.tokens[:, : depth + 1]], axis=1)
        return AdaptiveState(learn(state.own, text, verdict.num_emitted), ends(text, verdict.num_emitted))

    return Drafter(num_nodes, init, propose, commit)


def search(shared: Trigrams, state: AdaptiveState, *, depth: int, beam: int) -> Candidates:
    """Beam search through the tables from each row's last two tokens on; what they do not know has a score of -inf."""
    of_rows = jax.vmap(jax.vmap(lambda own, bigram: following(own, shared, bigram), (None, 0)))

    def children(bigrams: Array) -> tuple[Array, Array]:
        tokens, log_p = of_rows(state.own, bigrams)
        gain, best = jax.lax.top_k(log_p, beam)
        return jnp.take_along_axis(tokens, best, axis=-1), gain

    def expand(carry, _):
        bigrams, score = carry
        tokens, gain = children(bigrams)
        tokens, total = (leaf.reshape(len(score), -1) for leaf in (tokens, score[..., None] + gain))
        best, chosen = jax.lax.top_k(total, beam)
        of = lambda leaf, at: jnp.take_along_axis(leaf, at, axis=1)
        grown = jnp.stack([of(bigrams[..., 1], chosen // beam), of(tokens, chosen)], axis=-1)
        return (grown, best), (tokens, total, chosen)

    tokens, gain = (leaf[:, 0] for leaf in children(state.last[:, None]))
    begun = jnp.stack([jnp.broadcast_to(state.last[:, 1:], tokens.shape), tokens], axis=-1)
    _, levels = jax.lax.scan(expand, (begun, gain), length=depth - 1)
    return candidates(gathered(tokens, gain, levels))


def following(own: Trigrams, shared: Trigrams, bigram: Array) -> tuple[Array, Array]:
    """What two tables make of a bigram `[2]`: `[2S]` tokens, and log probabilities by their added weights.

    A token that both know counts once; a part is left to what neither has seen, the more the less has been seen.
    """
    (tokens, weight), (others, further) = looked_up(own, bigram), looked_up(shared, bigram)
    both = (tokens[:, None] == others) & (weight[:, None] > 0) & (further > 0)
    summed = jnp.concatenate([weight + jnp.where(both, further, 0.0).sum(1), jnp.where(both.any(0), 0.0, further)])
    return jnp.concatenate([tokens, others]), jnp.log(summed / (summed.sum() + UNSEEN))
