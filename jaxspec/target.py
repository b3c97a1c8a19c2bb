"""A language model as the target: it scores a whole window in one call behind its rewindable cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.attention import Attend, dense
from jaxspec.sampling import log_probs
from jaxspec.transformer import Cache, LMConfig, extend, prefill, unembed
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
        depth, visible = (None, None) if parents is None else tree_shape(parents)
        shape = {"depth": depth, "visible": visible, "attend": attend}
        features, cache = extend(config, params, state.cache, window, state.length, **shape)
        logits = unembed(config, params, features, vocab_size)
        return Scores(log_probs(logits, sampling), logits, features[..., : config.feature_width]), state._replace(
            cache=cache
        )

    def commit(state: LMState, verdict, parents=None):
        cache = state.cache if parents is None else compact(state.cache, state.length, verdict.path)
        return LMState(cache, state.length + verdict.num_emitted)

    return Target(init, score, commit)


def tree_shape(parents: Array) -> tuple[Array, Array]:
    """Depth `[B, W]` and mutual visibility `[B, W, W]` of a window whose nodes hang on `parents [B, N]`."""
    batch, nodes = parents.shape
    width = nodes + 1
    up = jnp.concatenate([jnp.zeros((batch, 1), parents.dtype), parents], axis=1)

    def climb(carry, _):
        at, seen, depth = carry
        seen = seen | (jnp.arange(width) == at[..., None])
        depth = depth + (at > 0)
        return (jnp.take_along_axis(up, at, 1), seen, depth), None

    at = jnp.broadcast_to(jnp.arange(width), (batch, width))
    start = (at, jnp.zeros((batch, width, width), bool), jnp.zeros((batch, width), jnp.int32))
    (_, seen, depth), _ = jax.lax.scan(climb, start, length=width)
    return depth, seen | (jnp.arange(width) == 0)


def compact(cache: Cache, start: Array, path: Array) -> Cache:
    """Moves the window rows on `path [B, W]` to the slots right behind `start [B]`."""

    def gather(row, at, steps):
        return jax.lax.dynamic_update_slice(row, row[:, at + steps], (0, at, 0))

    return jax.tree.map(lambda leaf: jax.vmap(gather)(leaf, start, path), cache)
