"""Acceptance rules, and the walk that draws along them.

A rule is a deterministic `law(draft, log_p) -> [W, V]`, written for one row: the distribution of the token emitted after
each window row, given what was drafted. `walk` draws from it and descends while the drawn token is a drafted child, so
that a rule is exact when its law, averaged over drafts, is the target's; tests enumerate the very functions here.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.sampling import draw
from jaxspec.types import Draft, Verdict


def greedy(draft: Draft, log_p: Array) -> Array:
    """The target's own choice after every row; for a `log_p` that is one-hot, as `sampling=None` makes it."""
    del draft
    return jnp.exp(log_p)


def rejection(draft: Draft, log_p: Array) -> Array:
    """Keeps a drafted token with probability min(1, p/q), else draws from the residual max(p - q, 0).

    Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192. Exact for every drafter; chains only.

    Args:
        draft: one row's `tokens [N]`, `num_drafted []`, `log_q [N, V]` or None for a deterministic proposal.
        log_p: `[W, V]`, row i scores the token after i drafted ones.

    Returns:
        `[W, V]` law of the token emitted after each row; rows past `num_drafted` follow p itself.
    """
    num_nodes, vocab = draft.tokens.shape[0], log_p.shape[-1]
    chosen = jax.nn.one_hot(draft.tokens, vocab)
    q = chosen if draft.log_q is None else jnp.exp(draft.log_q)
    counted = (jnp.arange(num_nodes) < draft.num_drafted)[:, None]
    # A zero row after the last draft: "all accepted" is a residual against nothing, no case of its own.
    pad = lambda x: jnp.concatenate([jnp.where(counted, x, 0.0), jnp.zeros((1, vocab))])
    p, q, chosen = jnp.exp(log_p), pad(q), pad(chosen)

    p_chosen, q_chosen = jnp.sum(p * chosen, -1, keepdims=True), jnp.sum(q * chosen, -1, keepdims=True)
    accept = jnp.where(p_chosen < q_chosen, p_chosen / jnp.where(q_chosen > 0, q_chosen, 1.0), 1.0)
    accept = jnp.where(chosen.sum(-1, keepdims=True) > 0, accept, 0.0)
    residual = jnp.maximum(p - q, 0.0)
    mass = residual.sum(-1, keepdims=True)
    residual = jnp.where(mass > 0, residual / jnp.where(mass > 0, mass, 1.0), p)
    return accept * chosen + (1 - accept) * residual


def walk(key: Array | None, draft: Draft, law: Array) -> Verdict:
    """Draws along one row's law, descending while the token drawn is a drafted child.

    Args:
        key: consumed; None when every law row is one-hot, which needs no noise.
        draft: one row's draft.
        law: `[W, V]`.

    Returns:
        Verdict of that row: the accepted path and the token that left it.
    """
    width = law.shape[0]
    if key is None:
        drawn = jnp.argmax(law, axis=-1)
    else:
        keys = jax.vmap(lambda node: jax.random.fold_in(key, node))(jnp.arange(width))
        drawn = jax.vmap(draw)(keys, jnp.log(law))
    drawn = drawn.astype(jnp.int32)
    if draft.parents is None:
        return _walk_chain(draft, drawn)
    return _walk_tree(draft, drawn)


def _walk_chain(draft: Draft, drawn: Array) -> Verdict:
    node = jnp.arange(draft.tokens.shape[0])
    matched = (drawn[:-1] == draft.tokens) & (node < draft.num_drafted)
    accepted = jnp.sum(jnp.cumprod(matched)).astype(jnp.int32)
    return Verdict(drawn, accepted + 1, accepted, jnp.arange(drawn.shape[0], dtype=jnp.int32))


def _walk_tree(draft: Draft, drawn: Array) -> Verdict:
    row, node = jnp.arange(drawn.shape[0])[:, None], jnp.arange(draft.tokens.shape[0])
    child = (draft.parents == row) & (draft.tokens == drawn[:, None]) & (node < draft.num_drafted)
    following = jnp.where(child.any(1), 1 + jnp.argmax(child, axis=1), -1)

    def descend(at, _):
        return jnp.where(at < 0, -1, following[at]), at

    _, path = jax.lax.scan(descend, jnp.int32(0), length=drawn.shape[0])
    emitted = jnp.sum(path >= 0).astype(jnp.int32)
    path = jnp.maximum(path, 0).astype(jnp.int32)
    return Verdict(drawn[path], emitted, emitted - 1, path)
