"""Who descends from whom in a token tree; node n of a draft is window row n + 1, row 0 is the text's last token."""

import jax.numpy as jnp
from jax import Array


def ancestry(parents: Array) -> Array:
    """`[..., W, W]` whether each window row is, or descends from, each other; of nodes that hang on `parents [..., N]`.

    A parent is a window row that stands before its children. The way up is doubled each time, so that the depth of a tree
    costs its logarithm and no loop.
    """
    nodes = parents.shape[-1]
    up = jnp.concatenate([jnp.zeros_like(parents[..., :1]), parents], axis=-1)
    seen = jnp.broadcast_to(jnp.eye(nodes + 1, dtype=bool), (*up.shape, nodes + 1))
    for _ in range(nodes.bit_length()):
        seen = seen | jnp.take_along_axis(seen, up[..., None], axis=-2)
        up = jnp.take_along_axis(up, up, axis=-1)
    return seen


def depths(lineage: Array) -> Array:
    """`[..., W]` how many drafted tokens lead to each window row, of `ancestry [..., W, W]`."""
    return lineage[..., 1:].sum(-1, dtype=jnp.int32)
