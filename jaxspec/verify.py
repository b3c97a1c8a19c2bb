"""Acceptance rules, and the walk that draws along them.

A rule's law is a deterministic `law(draft, log_p) -> [W, V]`, written for one row: the distribution of the token emitted
after each window row, given what was drafted. `walk` draws from it and descends while the drawn token is a drafted child,
so that a rule is exact when its law, averaged over drafts, is the target's; tests enumerate the very functions here.

`greedy` and `gumbel` let the target draw what it would draw anyway, for chains and trees of any drafter; `rejection`
keeps more of a sampled chain; `recursive`, `k_seq` and `greedy_drafts` of several drafts of one token, see `multidraft`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxspec import ancestry
from jaxspec.sampling import VERIFY, draw, of_the_round, of_the_token
from jaxspec.types import Draft, Rule, Verdict

HALVINGS = 24  # of an interval, after which float32 tells no more
TINY = float(jnp.finfo(jnp.float32).tiny)


def targets_own(draft: Draft, log_p: Array) -> Array:
    """The target's own law after every row, whatever was drafted."""
    del draft
    return jnp.exp(log_p)


def p_over_q(draft: Draft, log_p: Array) -> Array:
    """Keeps a drafted token with probability min(1, p/q), else draws from the residual max(p - q, 0).

    Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192. Exact for every drafter. It tries one draft a row, so
    that of trees it takes those without q: there rejecting child after child leaves the target's own law, which is it.

    Args:
        draft: one row's `tokens [N]`, `num_drafted []`, `log_q [N, V]` or None for a deterministic proposal.
        log_p: `[W, V]`, row i scores the token after i drafted ones.

    Returns:
        `[W, V]` law of the token emitted after each row; rows past `num_drafted` follow p itself.
    """
    if draft.parents is not None:
        if draft.log_q is not None:
            raise ValueError(
                "p/q rejection tries one draft a row, this one has parents and q; drop q or take another rule"
            )
        return targets_own(draft, log_p)
    num_nodes, vocab = draft.tokens.shape[0], log_p.shape[-1]
    chosen = jax.nn.one_hot(draft.tokens, vocab)
    q = chosen if draft.log_q is None else jnp.exp(draft.log_q)
    counted = (jnp.arange(num_nodes) < draft.num_drafted)[:, None]
    # A zero row after the last draft: "all accepted" is a residual against nothing, no case of its own.
    pad = lambda x: jnp.concatenate([jnp.where(counted, x, 0.0), jnp.zeros((1, vocab))])
    p, q, chosen = jnp.exp(log_p), pad(q), pad(chosen)

    accept, residual = one_draft(p, q, chosen)
    return accept * chosen + (1 - accept) * residual


def one_draft(p: Array, q: Array, chosen: Array) -> tuple[Array, Array]:
    """Whether one draft from q is kept, and what is drawn from if it is not.

    Args:
        p, q: `[..., V]`; chosen: `[..., V]` one-hot, or zero, with q, where nothing was drafted.

    Returns:
        `[..., 1]` probability that it is kept; `[..., V]` the residual's distribution, or p where p - q leaves nothing.
    """
    p_chosen, q_chosen = jnp.sum(p * chosen, -1, keepdims=True), jnp.sum(q * chosen, -1, keepdims=True)
    accept = jnp.where(p_chosen < q_chosen, p_chosen / jnp.where(q_chosen > 0, q_chosen, 1.0), 1.0)
    accept = jnp.where(chosen.sum(-1, keepdims=True) > 0, accept, 0.0)
    return accept, _normalised(jnp.maximum(p - q, 0.0), p)


def recursively(draft: Draft, log_p: Array) -> Array:
    """Tries a row's drafts one after another, each by p/q against what the rejected ones left of p.

    Exact for whatever tree whose `log_q` says what each node was drawn from given its elder siblings: with replacement,
    without, or for certain. Source: SpecInfer, https://arxiv.org/abs/2305.09781; without replacement: Jeon et al. 2024,
    https://arxiv.org/abs/2402.14160.

    Args and what it returns: as `p_over_q`; `parents` of a node come before it.
    """
    chosen, q, parents = _nodes(draft, log_p.shape[-1])

    def attempt(carry: tuple[Array, Array, Array], node: tuple[Array, Array, Array]):
        kept, residual, left = carry
        own, drawn_from, row = node
        accept, rest = one_draft(residual[row], drawn_from, own)
        kept = kept.at[row].add(left[row] * accept * own)
        return (kept, residual.at[row].set(rest), left.at[row].multiply(1 - accept)), None

    p = jnp.exp(log_p)
    start = jnp.zeros_like(p), p, jnp.ones((len(p), 1))
    (kept, residual, left), _ = jax.lax.scan(attempt, start, (chosen, q, parents))
    return kept + left * residual


def in_sequence(draft: Draft, log_p: Array) -> Array:
    """K-SEQ: keeps the first of a row's drafts that passes p / (rho q), else draws from what they leave of p.

    Exact where all drafts of a row are independent draws from one q. Source: SpecTr, https://arxiv.org/abs/2310.15141.
    """
    chosen, q, parents = _nodes(draft, log_p.shape[-1])
    p, child = jnp.exp(log_p), _children(draft, parents)
    q = jnp.where(child.any(1, keepdims=True), q[jnp.argmax(child, axis=1)], 0.0)
    number = child.sum(1, keepdims=True)
    rho = k_seq_factor(p, q, number)
    overlap = jnp.minimum(q, p / rho)
    beta = overlap.sum(-1, keepdims=True)
    residual = _normalised(jnp.maximum(p - _some_of(beta, number) / jnp.maximum(beta, TINY) * overlap, 0.0), p)
    passes = jnp.minimum((p / jnp.maximum(rho * q, TINY))[:, draft.tokens], 1.0) * child
    left = jnp.cumprod(1 - passes, axis=1)
    before = jnp.concatenate([jnp.ones_like(left[:, :1]), left], axis=1)
    kept = jnp.matmul(before[:, :-1] * passes, chosen, precision="highest")  # accelerators round products by default
    return kept + before[:, -1:] * residual


def k_seq_factor(p: Array, q: Array, number: Array) -> Array:
    """The least rho from 1 to n with which n drafts leave the target's law: 1 - (1 - beta) ** n = rho beta, by bisection.

    beta, a draft's chance, is the sum of min(q, p / rho).

    Args:
        p, q: `[..., V]`; number: `[..., 1]`, n.

    Returns:
        `[..., 1]`.
    """

    def halve(_, bounds):
        low, high = bounds
        rho = (low + high) / 2
        beta = jnp.minimum(q, p / rho).sum(-1, keepdims=True)
        enough = rho * beta >= _some_of(beta, number)
        return jnp.where(enough, low, rho), jnp.where(enough, rho, high)

    most = jnp.maximum(number, 1).astype(p.dtype)
    return jax.lax.fori_loop(0, HALVINGS, halve, (jnp.ones_like(most), most))[1]


def by_the_last(draft: Draft, log_p: Array) -> Array:
    """p/q with the last of a row's drafts, given the elder ones, which are kept where the residual is drawn there.

    Exact as `recursively` is; no rule accepts more of greedy drafts, the n - 1 likeliest tokens and a draw from the rest
    of q. Source: Hu et al. 2025, https://arxiv.org/abs/2502.18779.
    """
    chosen, q, parents = _nodes(draft, log_p.shape[-1])
    child = _children(draft, parents)
    last = child.shape[1] - 1 - jnp.argmax(child[:, ::-1], axis=1)
    own = lambda of_nodes: jnp.where(child.any(1, keepdims=True), of_nodes[last], 0.0)
    accept, residual = one_draft(jnp.exp(log_p), own(q), own(chosen))
    return accept * own(chosen) + (1 - accept) * residual


greedy = Rule(targets_own, of_the_round)
rejection = Rule(p_over_q, of_the_round)
# The drafter draws from q with the very noise with which the target draws from p, and a draft is kept when both pick the
# same token: text depends on the noise alone, not on the drafter. Source: Daliri et al., https://arxiv.org/abs/2408.07978.
gumbel = Rule(targets_own, of_the_token)
recursive, k_seq, greedy_drafts = (Rule(law, of_the_round) for law in (recursively, in_sequence, by_the_last))
RULES = {"greedy": greedy, "rejection": rejection, "gumbel": gumbel}
RULES |= {"recursive": recursive, "k-seq": k_seq, "greedy-drafts": greedy_drafts}
SAMPLED = ("rejection", "gumbel")  # those that serve rows above temperature 0, for chains


def window_noise(rule: Rule, key: Array, start: Array, draft: Draft) -> Array:
    """`[W]` keys of the target's draws in one row's round, which begins at length `start`."""
    node = jnp.arange(draft.tokens.shape[0] + 1)
    return jax.vmap(lambda node, depth: rule.noise(key, start, VERIFY, node, depth))(node, depths(draft))


def depths(draft: Draft) -> Array:
    """`[W]` how many drafted tokens lead to each window row of one row's draft."""
    width = draft.tokens.shape[0] + 1
    if draft.parents is None:
        return jnp.arange(width)
    return ancestry.depths(ancestry.ancestry(draft.parents))


def places(draft: Draft) -> Array:
    """How many places behind the last token one row's draft speaks of: a chain's tokens, a tree's levels."""
    if draft.parents is None:
        return draft.num_drafted
    return jnp.max(jnp.where(jnp.arange(draft.tokens.shape[0] + 1) <= draft.num_drafted, depths(draft), 0))


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
    return _walk_tree(draft, draft.parents, drawn)


def _nodes(draft: Draft, vocab: int) -> tuple[Array, Array, Array]:
    """One row's tokens as one-hot `[N, V]`, what they were drawn from `[N, V]`, both zero past `num_drafted`, and parents."""
    node = jnp.arange(draft.tokens.shape[0])
    chosen = jax.nn.one_hot(draft.tokens, vocab)
    q = chosen if draft.log_q is None else jnp.exp(draft.log_q)
    counted = (node < draft.num_drafted)[:, None]
    return counted * chosen, jnp.where(counted, q, 0.0), node if draft.parents is None else draft.parents


def _children(draft: Draft, parents: Array) -> Array:
    """`[W, N]` which counted nodes hang on which window row."""
    node = jnp.arange(parents.shape[0])
    return (parents == jnp.arange(len(node) + 1)[:, None]) & (node < draft.num_drafted)


def _some_of(beta: Array, number: Array) -> Array:
    """1 - (1 - beta) ** n without cancelling; 0 for no draft."""
    return -jnp.expm1(jnp.maximum(number, 1) * jnp.log1p(-jnp.minimum(beta, 1.0))) * (number > 0)


def _normalised(residual: Array, p: Array) -> Array:
    """A residual as a distribution; p where nothing is left, which is when it is never drawn from but for rounding."""
    mass = residual.sum(-1, keepdims=True)
    return jnp.where(mass > 0, residual / jnp.where(mass > 0, mass, 1.0), p)


def _walk_chain(draft: Draft, drawn: Array) -> Verdict:
    node = jnp.arange(draft.tokens.shape[0])
    matched = (drawn[:-1] == draft.tokens) & (node < draft.num_drafted)
    accepted = jnp.sum(jnp.cumprod(matched)).astype(jnp.int32)
    return Verdict(drawn, accepted + 1, accepted, jnp.arange(drawn.shape[0], dtype=jnp.int32))


def _walk_tree(draft: Draft, parents: Array, drawn: Array) -> Verdict:
    row, node = jnp.arange(drawn.shape[0])[:, None], jnp.arange(draft.tokens.shape[0])
    child = (parents == row) & (draft.tokens == drawn[:, None]) & (node < draft.num_drafted)
    following = jnp.where(child.any(1), 1 + jnp.argmax(child, axis=1), 0)
    followed = jnp.concatenate([jnp.ones(1, bool), following[parents] == node + 1])
    lineage = ancestry.ancestry(parents)
    walked = (followed | ~lineage).all(1)
    accepted = jnp.sum(walked).astype(jnp.int32) - 1
    # Of the rows walked each has a depth of its own, which is its place on the path.
    path = jnp.argmax(walked & (ancestry.depths(lineage) == row), axis=1).astype(jnp.int32)
    return Verdict(drawn[path], accepted + 1, accepted, path)
