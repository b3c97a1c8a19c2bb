"""Acceptance rules, and the walk that draws along them.

A rule's law is a deterministic `law(draft, log_p) -> [W, V]`, written for one row: the distribution of the token emitted
after each window row, given what was drafted. `walk` draws from it and descends while the drawn token is a drafted child,
so that a rule is exact when its law, averaged over drafts, is the target's; tests enumerate the very functions here.

`greedy` and `gumbel` let the target draw what it would draw anyway, for chains and trees of any drafter; `rejection`
keeps more of a sampled chain.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec.sampling import VERIFY, draw, of_the_round, of_the_token
from jaxspec.types import Draft, Rule, Verdict


def targets_own(draft: Draft, log_p: Array) -> Array:
    """The target's own law after every row, whatever was drafted."""
    del draft
    return jnp.exp(log_p)


def p_over_q(draft: Draft, log_p: Array) -> Array:
    """Keeps a drafted token with probability min(1, p/q), else draws from the residual max(p - q, 0).

    Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192. Exact for every drafter, and for chains only: it
    tries one draft a row.

    Args:
        draft: one row's `tokens [N]`, `num_drafted []`, `log_q [N, V]` or None for a deterministic proposal.
        log_p: `[W, V]`, row i scores the token after i drafted ones.

    Returns:
        `[W, V]` law of the token emitted after each row; rows past `num_drafted` follow p itself.
    """
    if draft.parents is not None:
        raise ValueError("rejection is exact for chains, this draft has parents; verify trees with greedy or gumbel")
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


greedy = Rule(targets_own, of_the_round)
rejection = Rule(p_over_q, of_the_round)
# The drafter draws from q with the very noise with which the target draws from p, and a draft is kept when both pick the
# same token: text depends on the noise alone, not on the drafter. Source: Daliri et al., https://arxiv.org/abs/2408.07978.
gumbel = Rule(targets_own, of_the_token)
RULES = {"greedy": greedy, "rejection": rejection, "gumbel": gumbel}
SAMPLED = ("rejection", "gumbel")  # those that serve rows above temperature 0


def window_noise(rule: Rule, key: Array, start: Array, draft: Draft) -> Array:
    """`[W]` keys of the target's draws in one row's round, which begins at length `start`."""
    node = jnp.arange(draft.tokens.shape[0] + 1)
    return jax.vmap(lambda node, depth: rule.noise(key, start, VERIFY, node, depth))(node, depths(draft))


def depths(draft: Draft) -> Array:
    """`[W]` how many drafted tokens lead to each window row of one row's draft."""
    width = draft.tokens.shape[0] + 1
    if draft.parents is None:
        return jnp.arange(width)
    up = jnp.concatenate([jnp.zeros(1, draft.parents.dtype), draft.parents])
    climb = lambda carry, _: ((up[carry[0]], carry[1] + (carry[0] > 0)), None)
    (_, depth), _ = jax.lax.scan(climb, (jnp.arange(width), jnp.zeros(width, int)), length=draft.tokens.shape[0])
    return depth


def walk(noise: Array | None, draft: Draft, law: Array) -> Verdict:
    """Draws along one row's law, descending while the token drawn is a drafted child.

    Args:
        noise: `[W]` keys, consumed; None when every law row is one-hot, which needs no noise.
        draft: one row's draft.
        law: `[W, V]`.

    Returns:
        Verdict of that row: the accepted path and the token that left it.
    """
    drawn = jnp.argmax(law, axis=-1) if noise is None else jax.vmap(draw)(noise, jnp.log(law))
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
