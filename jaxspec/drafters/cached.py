"""Query and correct: a language model goes on drafting while the target verifies, into a cache that the target queries.

A round's chain is what the cache holds when it begins. While the target verifies it, the drafter reads so many layers more
below all that it holds, and the verdict then corrects the cache, see `jaxspec.candidates`. Source: CARD,
https://arxiv.org/abs/2508.04462.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec import candidates
from jaxspec.attention import Attend, dense
from jaxspec.candidates import Correction, Layers, chain, corrected, grown, planted, visible
from jaxspec.drafters.beam import likeliest_tokens
from jaxspec.drafters.lm import Branches, LMDrafterParams, LMDrafterState, begin, model
from jaxspec.recording import Recorder
from jaxspec.transformer import LMConfig, compact
from jaxspec.types import Draft, Drafter, Prompt, SpecInfo, Verdict


class CachedState(NamedTuple):
    """The model's state, whose cache has the candidates behind the text, layer after layer; and the candidates.

    made: `[B]` layers that were added since the last verdict.
    """

    model: LMDrafterState
    layers: Layers
    made: Array


def cached_drafter(
    config: LMConfig,
    num_speculative_tokens: int,
    *,
    layers: int,
    width: int = 8,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts a chain of at most so many tokens out of a cache of candidates; parameters are those of `lm_drafter`.

    The cache is deep enough for a chain behind one that is kept as a whole, 2 K + 1 layers; a full one is not added to. It
    holds likeliest tokens of the model itself, whatever a row samples, so that the target draws its own token at each place
    and goes on while that is the chain's: exact at every temperature.

    Args:
        layers: that are added while the target verifies, each in one call of the drafter; about what a target call takes to
            what a drafter call takes. More than `num_speculative_tokens` keep up with a target that accepts everything.
        width: nodes of a layer, and children that each of them is given.
        vocab_size: the target's, where the two are padded differently.

    Raises:
        ValueError: there is nothing to draft, or no time to draft it.
    """
    if min(num_speculative_tokens, layers, width) < 1:
        raise ValueError(
            f"{num_speculative_tokens} tokens of {layers} layers of {width} nodes cannot be; all are 1 at least"
        )
    size = 2 * num_speculative_tokens + 2

    def init(params: LMDrafterParams, prompt: Prompt, slots: int) -> CachedState:
        own = begin(config, params, prompt, slots + size * width, dtype)
        last = jnp.take_along_axis(jnp.asarray(prompt.tokens), own.length[:, None] - 1, axis=1)[:, 0]
        return CachedState(own, jax.vmap(lambda token: planted(token, size, width))(last), jnp.zeros_like(own.length))

    def propose(params, state: CachedState, tokens, length, noise, sampling):
        del params, tokens, length, noise, sampling
        return Draft(*jax.vmap(lambda own: chain(own, num_speculative_tokens))(state.layers)), state

    def meanwhile(params: LMDrafterParams, state: CachedState) -> CachedState:
        read, say = model(config, params, state.model.adapter, vocab_size=vocab_size, attend=attend)
        origin = state.model.length - 1
        depth = jnp.broadcast_to(jnp.arange(size * width) // width, (len(origin), size * width))

        def add(carry, _):
            cache, own = carry
            tokens = jax.vmap(lambda row: row.tokens[row.last])(own)
            branches = Branches(depth, jax.vmap(visible)(own), origin)
            hidden, cache = read(cache, tokens, origin + own.last * width, branches)
            return (cache, jax.vmap(grown)(own, *likeliest_tokens(say(hidden), width))), None

        (cache, own), _ = jax.lax.scan(add, (state.model.cache, state.layers), None, length=layers)
        return CachedState(state.model._replace(cache=cache), own, own.last - state.layers.last)

    def commit(params, state: CachedState, verdict: Verdict, scores) -> CachedState:
        del params, scores
        own, (following, _, steps) = state.model, correction(state, verdict)
        cache = compact(own.cache, own.length - 1, steps)
        own = own._replace(cache=cache, length=own.length + verdict.num_emitted)
        return CachedState(own, following, jnp.zeros_like(state.made))

    return Drafter(num_speculative_tokens, init, propose, commit, layers, meanwhile=meanwhile)


def correction(state: CachedState, verdict: Verdict) -> Correction:
    """What verdicts make of the rows' candidates."""
    return jax.vmap(corrected)(state.layers, verdict.tokens, verdict.num_emitted)


def outcomes(layers: int) -> Recorder:
    """Records `[B, 3, layers + 1]` of a row's rounds how many had each outcome, by layers that were added in them."""

    def init(prompt: Prompt) -> Array:
        return jnp.zeros((prompt.length.shape[0], candidates.MISS + 1, layers + 1), jnp.int32)

    def fold(record: Array, info: SpecInfo) -> Array:
        found = correction(info.drafter, info.verdict).outcome
        alive = (info.verdict.num_emitted > 0).astype(jnp.int32)
        return record.at[jnp.arange(len(found)), found, info.drafter.made].add(alive)

    return Recorder(init, fold)
