"""A language model as the target: it scores a whole window in one call behind its rewindable cache."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxspec.ancestry import ancestry, depths
from jaxspec.attention import Attend, dense
from jaxspec.sampling import log_probs
from jaxspec.transformer import Cache, LMConfig, compact, extend, prefill, unembed
from jaxspec.types import Prompt, Scores, Target


class LMState(NamedTuple):
    """A model's cache and how much of it is valid, `length [B]`."""

    cache: Cache
    length: Array


def lm_target(config: LMConfig, dtype=jnp.float32, vocab_size: int | None = None, *, attend: Attend = dense) -> Target:
    """The target made of a decoder-only LM; its parameters are the LM's, `vocab_size` another's where it writes for that."""

    def init(params, prompt: Prompt, slots: int):
        features, cache = prefill(config, params, prompt.tokens, prompt.length, slots, dtype)
        # The last prompt token opens the first window: prefill caches it but emits nothing.
        return LMState(cache, prompt.length - 1), features[..., : config.feature_width]

    def score(params, state: LMState, window, parents, sampling):
        visible = None if parents is None else ancestry(parents)
        shape = {} if visible is None else {"depth": depths(visible), "visible": visible}
        features, cache = extend(config, params, state.cache, window, state.length, attend=attend, **shape)
        logits = unembed(config, params, features, vocab_size)
        return Scores(log_probs(logits, sampling), logits, features[..., : config.feature_width]), state._replace(
            cache=cache
        )

    def commit(state: LMState, verdict, parents=None):
        cache = state.cache if parents is None else compact(state.cache, state.length, verdict.path)
        return LMState(cache, state.length + verdict.num_emitted)

    return Target(init, score, commit)
