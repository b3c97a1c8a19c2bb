"""Emitted tokens follow the target exactly, whatever the drafter says: by enumeration, and by sampling the real loop.

The enumeration calls the shipped law and the shipped walk on every draft and on every token that could be drawn after
every window row, and sums: one round, completed to N + 1 tokens by the target's own law. Nothing is sampled. A draw's
probability is its law's, so that it covers both ways of keying the noise: along a path every draw has noise of its own.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import SETTINGS, decode, prompt_of, random_table, table_drafter, table_target

from jaxspec import verify
from jaxspec.drafters import cached_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.sampling import log_probs
from jaxspec.speculate import speculator
from jaxspec.transformer import LMConfig, init
from jaxspec.types import Draft, Sampling, SpecParams

RULES = {"greedy": verify.greedy, "gumbel": verify.gumbel, "rejection": verify.rejection}
LAWS = {rule.law.__name__: rule.law for rule in RULES.values()}
TREES = [(0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 2), (0, 0, 1, 1), (0, 0, 2, 1)]


def texts(vocab: int, length: int) -> np.ndarray:
    """Every text of `length` tokens, in the order of `code`."""
    return np.array(list(itertools.product(range(vocab), repeat=length)), np.int32).reshape(vocab**length, length)


def code(tokens: np.ndarray, vocab: int) -> np.ndarray:
    return tokens @ (vocab ** np.arange(tokens.shape[-1])[::-1])


@cache
def language(seed: int, vocab: int, setting: str) -> list[np.ndarray]:
    """A random `log p(token | text)` for every text of 0..4 tokens: `[V ** n, V]` for each n."""
    sizes = vocab ** np.arange(5)
    logits = 1.5 * np.random.default_rng(seed).normal(size=(1, sizes.sum(), vocab)).astype(np.float32)
    return np.split(np.asarray(log_probs_once(logits, SETTINGS[setting]))[0], np.cumsum(sizes)[:-1])


log_probs_once = jax.jit(log_probs)


def likelihoods(model, tokens: np.ndarray) -> np.ndarray:
    """`p(token | text before it)` of every token of `tokens [texts, n]`, in float64."""
    vocab = model[0].shape[-1]
    at = [model[i][code(tokens[:, :i], vocab), tokens[:, i]] for i in range(tokens.shape[1])]
    return np.exp(np.array(at, np.float64).reshape(tokens.T.shape).T)


def lineage(parents, row: int) -> list[int]:
    """The nodes on the way to a window row, in order; all before it for a chain."""
    if parents is None:
        return list(range(row))
    return [] if row == 0 else [*lineage(parents, parents[row - 1]), row - 1]


def every_draft(vocab: int, nodes: int, parents, num_drafted: int) -> Draft:
    tokens = texts(vocab, nodes)
    tree = None if parents is None else jnp.broadcast_to(jnp.array(parents, jnp.int32), tokens.shape)
    return Draft(jnp.asarray(tokens), jnp.full(len(tokens), num_drafted, jnp.int32), None, tree)


def at_rows(model, drafts: np.ndarray, parents, rows: int) -> np.ndarray:
    """`[drafts, rows, V]` what a model says after each window row."""
    vocab = model[0].shape[-1]
    paths = [lineage(parents, row) for row in range(rows)]
    return np.array([model[len(path)][code(drafts[:, path], vocab)] for path in paths]).swapaxes(0, 1)


@cache
def every_walk(vocab: int, nodes: int, parents, num_drafted: int):
    """The shipped walk for every draft and every drawn token: tokens `[drafts, draws, W]` and how many are emitted."""
    drawn = jax.nn.one_hot(texts(vocab, nodes + 1), vocab)
    verdict = walks(every_draft(vocab, nodes, parents, num_drafted), drawn)
    return np.asarray(verdict.tokens), np.asarray(verdict.num_emitted)


walks = jax.jit(jax.vmap(jax.vmap(partial(verify.walk, None), (None, 0)), (0, None)))


@partial(jax.jit, static_argnums=0)
def laws(law, draft: Draft, log_p) -> jax.Array:
    return jax.vmap(law)(draft, log_p)


def emitted(law, draft: Draft, p, parents, num_drafted: int) -> np.ndarray:
    """`[drafts, texts]` the law of N + 1 tokens given each draft."""
    nodes, vocab = draft.tokens.shape[1], p[0].shape[-1]
    drafts, all_texts = np.asarray(draft.tokens), texts(vocab, nodes + 1)
    rows = np.asarray(laws(law, draft, at_rows(p, drafts, parents, nodes + 1)), np.float64)
    mass = rows[:, np.arange(nodes + 1), all_texts].prod(-1)  # of every token drawn after every row
    tokens, num_emitted = every_walk(vocab, nodes, parents, num_drafted)
    by_target, total = likelihoods(p, all_texts), 0.0
    for n in range(1, nodes + 2):
        begun = np.zeros((len(drafts), vocab**n))
        np.add.at(begun, (np.arange(len(drafts))[:, None], code(tokens[..., :n], vocab)), mass * (num_emitted == n))
        total = total + begun[:, code(all_texts[:, :n], vocab)] * by_target[:, n:].prod(1)
    return total


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("law", LAWS)
def test_every_proposed_chain_leaves_the_targets_law(law, k, setting):
    for vocab, num_drafted in itertools.product((2, 3, 4), range(k + 1)):
        p = language(vocab, vocab, setting)
        found = emitted(LAWS[law], every_draft(vocab, k, None, num_drafted), p, None, num_drafted)
        expected = likelihoods(p, texts(vocab, k + 1)).prod(1)
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


def drafters(p, vocab: int, setting: str) -> dict[str, list[np.ndarray]]:
    """Languages to draft from: unlike the target's, its own up to rounding, and one that it all but never follows."""
    nudge = np.random.default_rng(0)
    nudged = lambda x: np.where(np.isfinite(x), x + np.float32(1e-7) * nudge.choice([-1, 0, 1], x.shape), x)
    least = [np.where(np.arange(vocab) == x.argmin(-1, keepdims=True), 0.0, -np.inf) for x in p]
    other = language(vocab + 10, vocab, setting)
    return {"other": other, "same": p, "nearly": [nudged(x).astype(np.float32) for x in p], "least": least}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sampled_chains_leave_the_targets_law(k, setting):
    """Residuals that are zero, or zero but for rounding, included."""
    for vocab in (2, 3, 4):
        p = language(vocab, vocab, setting)
        expected = likelihoods(p, texts(vocab, k + 1)).prod(1)
        for (name, q), num_drafted in itertools.product(drafters(p, vocab, setting).items(), range(k + 1)):
            draft = every_draft(vocab, k, None, num_drafted)
            drafts = np.asarray(draft.tokens)
            log_q = at_rows(q, drafts, None, k).astype(np.float32)
            found = emitted(verify.rejection.law, draft._replace(log_q=log_q), p, None, num_drafted)
            summed = likelihoods(q, drafts).prod(1) @ found
            np.testing.assert_allclose(summed, expected, atol=1e-6, err_msg=f"{vocab} {name} {num_drafted}")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("parents", TREES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_every_tree_leaves_the_targets_law(law, parents, setting):
    """Siblings alike included: the first of them is followed."""
    nodes = len(parents)
    for vocab in (2, 3, 4) if nodes < 4 else (2, 3):
        p = language(vocab, vocab, setting)
        expected = likelihoods(p, texts(vocab, nodes + 1)).prod(1)
        for num_drafted in range(nodes + 1):
            draft = every_draft(vocab, nodes, parents, num_drafted)
            found = emitted(LAWS[law], draft, p, parents, num_drafted)
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


def test_rejection_says_that_it_tries_one_sampled_draft_a_row():
    tree = Draft(jnp.array([1, 2]), jnp.int32(2), jnp.zeros((2, 4)), jnp.array([0, 0]))
    with pytest.raises(ValueError, match="one draft a row, this one has parents and q"):
        verify.rejection.law(tree, jnp.zeros((3, 4)))


@pytest.mark.parametrize("num_drafted", [0, 1, 2])
def test_masked_drafts_do_not_count(num_drafted):
    p, q = (language(seed, 3, "plain")[0] for seed in (3, 4))
    p, q = np.repeat(p, 4, 0), np.repeat(q, 3, 0)
    draft = Draft(jnp.array([1, 2, 0]), jnp.int32(num_drafted), jnp.asarray(q))
    rows = verify.rejection.law(draft, jnp.asarray(p))
    np.testing.assert_allclose(rows[num_drafted:], np.exp(p[num_drafted:]), atol=1e-6)
    verdict = verify.walk(None, draft, jax.nn.one_hot(jnp.array([1, 2, 0, 1]), 3))
    assert int(verdict.num_accepted) == num_drafted


def test_a_zero_residual_is_no_division_by_zero():
    p = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    draft = Draft(jnp.array([0]), jnp.int32(1), jnp.log(p[:1]))
    rows = verify.rejection.law(draft, jnp.log(p))
    np.testing.assert_allclose(rows, [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], atol=1e-7)


def chi_square(seen, expected) -> tuple[float, float]:
    """The statistic, and five deviations above its mean."""
    freedom = seen.size - 1
    return ((seen - expected) ** 2 / expected).sum(), freedom + 5 * np.sqrt(2 * freedom)


TINY = LMConfig(
    vocab_size=4,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=8,
    max_positions=64,
    tied=False,
)
DRAFTING = {
    "sampled": (table_drafter, lambda: random_table(6, 4)),
    "likeliest": (partial(table_drafter, deterministic=True), lambda: random_table(6, 4)),
    "cached": (
        lambda k: cached_drafter(TINY, k, layers=k, width=2),
        lambda: LMDrafterParams(jax.tree.map(lambda x: 4 * x, init(TINY, jax.random.key(6)))),
    ),
}
"""How tokens are drafted, and the parameters; what is cached is verified from the second token on."""


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "rule, drafting",
    [
        ("rejection", "sampled"),
        ("rejection", "likeliest"),
        ("gumbel", "sampled"),
        ("greedy", "likeliest"),
        ("rejection", "cached"),
    ],
)
def test_the_loop_samples_from_the_target(rule, k, drafting):
    """The first two tokens of many rows against p(a) p(b|a): chi-square within five deviations; k = 1 meets the bonus."""
    rows, vocab, (make, params) = 20_000, 4, DRAFTING[drafting]
    target, drafter = random_table(5, vocab), params()
    spec = speculator(table_target(), make(k), RULES[rule], stop_tokens=())
    prompt = prompt_of(np.zeros((rows, 2)), limit=2)
    state = decode(spec, target, drafter, prompt, Sampling(jnp.full(rows, 0.9, jnp.float32)))
    tokens = np.asarray(state.tokens[:, 2:4])
    p = np.exp(np.asarray(log_probs(jnp.asarray(target)[None], Sampling(np.full(1, 0.9, np.float32))))[0])
    seen = np.zeros((vocab, vocab))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    found, most = chi_square(seen, rows * p[0][:, None] * p)
    assert found < most


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_that_follows_the_target_is_always_kept(rule):
    vocab, k = 5, 3
    table = jnp.asarray(random_table(7, vocab))
    sampling = None if rule == "greedy" else Sampling(jnp.ones(64))
    spec = speculator(table_target(), table_drafter(k), RULES[rule], stop_tokens=())
    state = spec.init(SpecParams(table, table), prompt_of(np.zeros((64, 2)), limit=30), (), sampling, 64)
    step = jax.jit(spec.step)
    for _ in range(5):
        state, info = step(SpecParams(table, table), state)
        assert (info.num_accepted == k).all()


def test_a_tree_walk_descends_along_drawn_children():
    """Root 0 -> nodes a(1), b(2); b -> c(3): parents are window rows."""
    draft = Draft(jnp.array([5, 6, 7]), jnp.int32(3), None, jnp.array([0, 0, 2]))
    verdict = verify.walk(None, draft, jax.nn.one_hot(jnp.array([6, 0, 7, 9]), 10))
    assert verdict.tokens[: int(verdict.num_emitted)].tolist() == [6, 7, 9]
    assert verdict.path[:3].tolist() == [0, 2, 3]
    assert int(verdict.num_accepted) == 2
