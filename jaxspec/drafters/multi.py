"""A smaller language model that drafts several tokens for every place: a chain with siblings.

At each depth n drafts are siblings, and the first goes on. It costs the drafter what a chain costs, and where a sibling is
accepted, one token more; n chains side by side verify as many nodes, and accept as many where places do not differ, but are
n times the rows of every drafter call.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.attention import Attend, dense
from jaxspec.drafters.lm import LMDrafterParams, LMDrafterState, follow, lm_drafter, model
from jaxspec.multidraft import SCHEMES
from jaxspec.sampling import log_probs
from jaxspec.transformer import LMConfig
from jaxspec.types import Draft, Drafter


def multi_drafter(
    config: LMConfig,
    num_speculative_tokens: int,
    drafts: int,
    scheme: str,
    *,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    attend: Attend = dense,
) -> Drafter:
    """Drafts so many tokens ahead, `drafts` for each place; parameters, state and cache are those of `lm_drafter`.

    A sibling that was accepted is not in the cache, which holds the first draft of its place. It is a leaf: one token
    follows it, so that it is the last but one of the text, and the next round opens with the last two.

    Args:
        scheme: how a place's drafts are drawn, a name in `multidraft.SCHEMES`; greedy decoding takes the likeliest.
        vocab_size: the target's, where the two are padded differently.
    """
    alone = lm_drafter(config, num_speculative_tokens, vocab_size=vocab_size, dtype=dtype, attend=attend)
    draw = lambda key, log_q, logits: SCHEMES[scheme].draw(key, log_q, logits, drafts)
    nodes = num_speculative_tokens * drafts

    def propose(params: LMDrafterParams, state: LMDrafterState, tokens: Array, length: Array, noise, sampling):
        read, say = model(config, params, state.adapter, vocab_size=vocab_size, attend=attend)

        def choose(hidden: Array, step: Array) -> tuple[Array, Any]:
            logits = say(hidden)
            if sampling is None:
                own, log_q = jax.lax.top_k(logits, drafts)[1].astype(jnp.int32), None
            else:
                own, log_q = jax.vmap(draw)(noise(step), log_probs(logits, sampling), logits)
            return own[:, 0], (own, log_q)

        said, cache = follow(read, choose, num_speculative_tokens, state.cache, tokens, length)
        as_nodes = lambda leaf: leaf.reshape(len(leaf), nodes, *leaf.shape[3:])
        drafted, log_q = jax.tree.map(as_nodes, said)
        parents = jnp.broadcast_to(first_goes_on(num_speculative_tokens, drafts), drafted.shape)
        return Draft(drafted, jnp.full(length.shape, nodes, jnp.int32), log_q, parents), state._replace(cache=cache)

    return Drafter(nodes, alone.init, propose, alone.commit, num_speculative_tokens)


def first_goes_on(depth: int, drafts: int) -> Array:
    """`[N]` window row of each node's parent: n children of the last token, n of the first of them, and so on."""
    place = jnp.repeat(jnp.arange(depth, dtype=jnp.int32), drafts)
    return jnp.where(place == 0, 0, (place - 1) * drafts + 1)
