"""Drafts by looking the text's end up in the text itself: what followed it there before may follow again. No weights.

Source: prompt lookup decoding (Saxena 2023), https://github.com/apoorvumang/prompt-lookup-decoding.
"""

import jax.numpy as jnp
from jax import Array

from jaxspec.types import Draft, Drafter


def ngram_drafter(num_speculative_tokens: int, *, longest: int = 3, shortest: int = 1) -> Drafter:
    """Copies what followed the row's last tokens at the latest place where most of them stood before; nothing if nowhere.

    Args:
        longest, shortest: how many of the last tokens are compared, and must agree at least.
    """

    def propose(params, state, tokens: Array, length: Array, noise, sampling):
        del params, noise, sampling
        end = length[:, None] - 1  # the last token's place
        place = jnp.arange(tokens.shape[1])
        run = jnp.zeros(tokens.shape, jnp.int32)
        agrees = place < end
        for back in range(longest):
            own = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0), axis=1)
            agrees &= (jnp.roll(tokens, back, axis=1) == own) & (place >= back)
            run += agrees
        at = jnp.argmax(jnp.where(run >= shortest, run * tokens.shape[1] + place, -1), axis=1)[:, None]
        found = jnp.take_along_axis(run, at, axis=1)[:, 0] >= shortest
        period = jnp.maximum(end - at, 1)  # a copy that reaches the end goes on with its own beginning
        copied = jnp.take_along_axis(tokens, at + 1 + jnp.arange(num_speculative_tokens) % period, axis=1)
        return Draft(copied, jnp.where(found, num_speculative_tokens, 0)), state

    keep = lambda params, state, verdict, scores: state
    return Drafter(num_speculative_tokens, lambda params, prompt, slots: (), propose, keep)
