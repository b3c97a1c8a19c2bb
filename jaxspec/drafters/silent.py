"""Drafts nothing: autoregressive decoding, in a window as wide as one likes.

A window of one column is not always the fastest, and a wide one is the program that greedy parity is measured through.
"""

import jax.numpy as jnp

from jaxspec.types import Draft, Drafter


def silent_drafter(num_nodes: int) -> Drafter:
    """A drafter of `num_nodes` tokens that never count; it has no parameters and no state."""

    def propose(params, state, tokens, length, noise, sampling):
        del params, tokens, noise, sampling
        batch = length.shape[0]
        return Draft(jnp.zeros((batch, num_nodes), jnp.int32), jnp.zeros(batch, jnp.int32)), state

    return Drafter(num_nodes, lambda params, prompt, slots: (), propose, lambda params, state, verdict, scores: state)
