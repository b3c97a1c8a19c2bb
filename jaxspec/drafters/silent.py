"""Drafts nothing: autoregressive decoding, in a window as wide as one likes.

A window of one column is not always the fastest, and a wide one is the program that greedy parity is measured through.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxspec.types import Draft, Drafter


def silent_drafter(num_nodes: int, init: Callable[..., Any] = lambda params, prompt, slots: ()) -> Drafter:
    """A drafter of `num_nodes` tokens that never count; its state, none unless `init` makes another drafter's, stays."""

    def propose(params, state, tokens, length, noise, sampling):
        del params, tokens, noise, sampling
        batch = length.shape[0]
        return Draft(jnp.zeros((batch, num_nodes), jnp.int32), jnp.zeros(batch, jnp.int32)), state

    return Drafter(num_nodes, init, propose, lambda params, state, verdict, scores: state)
