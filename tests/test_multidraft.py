"""Several drafts of one token: what is drawn, what can be accepted of it at most, and that every rule keeps the target's law.

The optimum is compared with a linear program over all couplings of drafts and token; a rule is summed over all drafts.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, linprog
from test_lossless import chi_square

from jaxspec import multidraft, verify
from jaxspec.multidraft import SCHEMES, optimal_acceptance
from jaxspec.sampling import draw
from jaxspec.types import Draft

# The rules that are exact for the drafts of a scheme.
EXACT = [
    ("with-replacement", "recursive"),
    ("with-replacement", "k-seq"),
    ("with-replacement", "greedy-drafts"),
    ("without-replacement", "recursive"),
    ("without-replacement", "greedy-drafts"),
    ("greedy-drafts", "recursive"),
    ("greedy-drafts", "greedy-drafts"),
]


def pairs(vocab: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """p and q in float64: at random, sharp, apart, with zeros, alike, and sure."""
    rng = np.random.default_rng(vocab)
    flat, sharp = (lambda a=a: rng.dirichlet(np.full(vocab, a)) for a in (1.0, 0.2))
    half = np.where(np.arange(vocab) < vocab // 2, 1.0, 0.0)
    norm = lambda x: x / x.sum()
    one = np.eye(vocab)
    same = flat()
    return {
        "random": (flat(), flat()),
        "sharp": (sharp(), sharp()),
        "apart": (norm(half * flat()), norm((1 - half) * flat())),
        "zeros in q": (flat(), norm((1 - half) * flat())),
        "zeros in p": (norm((1 - half) * flat()), flat()),
        "alike": (same, same),
        "p sure": (one[1], flat()),
        "q sure": (flat(), one[0]),
        "both sure": (one[0], one[2]),
    }


def every_draw(q: np.ndarray, number: int, scheme: str):
    """All that a scheme can draw: tokens, their probability, and the `[n, V]` distributions that they were drawn from.

    Where q is spent the lowest of the free tokens follows, which it does for logits that fall.
    """
    vocab = len(q)
    if scheme == "with-replacement":
        for tokens in itertools.product(range(vocab), repeat=number):
            yield tokens, q[list(tokens)].prod(), np.tile(q, (number, 1))
        return
    best = np.argsort(-q, kind="stable")[: number - 1]

    def go_on(tokens: tuple, mass: float, laws: list):
        if len(tokens) == number:
            yield tokens, mass, np.array(laws)
            return
        left = np.where(np.isin(np.arange(vocab), tokens), 0.0, q)
        if left.sum() == 0:
            law = np.eye(vocab)[min(set(range(vocab)) - set(tokens))]
        elif scheme == "greedy-drafts" and len(tokens) < number - 1:
            law = np.eye(vocab)[best[len(tokens)]]
        else:
            law = left / left.sum()
        for token in np.flatnonzero(law):
            yield from go_on((*tokens, int(token)), mass * law[token], [*laws, law])

    yield from go_on((), 1.0, [])


def best_coupling(p: np.ndarray, sets: dict[frozenset, float]) -> float:
    """The linear program: the most probable that the token is in the set of drafts, over all joint laws of the two."""
    rows, vocab = list(sets), len(p)
    gain = np.array([[token in own for token in range(vocab)] for own in rows], float)
    of_set = np.kron(np.eye(len(rows)), np.ones(vocab))
    of_token = np.kron(np.ones(len(rows)), np.eye(vocab))
    found = linprog(-gain.ravel(), A_eq=np.vstack([of_set, of_token]), b_eq=[*(sets[own] for own in rows), *p])
    return -found.fun


def drawn_sets(q, number, scheme) -> dict[frozenset, float]:
    sets: dict[frozenset, float] = {}
    for tokens, mass, _ in every_draw(q, number, scheme):
        sets[frozenset(tokens)] = sets.get(frozenset(tokens), 0.0) + mass
    return sets


@cache
def optimum(number: int, scheme: str):
    return jax.jit(partial(optimal_acceptance, number=number, scheme=scheme))


single = lambda x: jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_optimum_is_that_of_the_linear_program(scheme, number):
    for vocab, (name, (p, q)) in itertools.product((3, 4, 5), [*pairs(5).items()]):
        p, q = pairs(vocab)[name]
        if scheme != "with-replacement" and np.count_nonzero(q) < number:
            continue  # the drafter goes on without q, the optimum counts the draws alone
        found = float(optimum(number, scheme)(single(p), single(q)))
        assert found == pytest.approx(best_coupling(p, drawn_sets(q, number, scheme)), abs=2e-6), (vocab, name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_draft_is_accepted_as_total_variation_says_and_more_drafts_lose_nothing(scheme):
    """On a real vocabulary's size, from flat to nearly sure."""
    rng = np.random.default_rng(0)
    for temperature in (0.1, 0.5, 1.0):
        logits = 3 * rng.normal(size=2000)
        p, q = (jax.nn.softmax(single(logits + rng.normal(size=2000)) / temperature) for _ in range(2))
        found = [float(optimum(number, scheme)(p, q)) for number in (1, 2, 3, 4)]
        assert found[0] == pytest.approx(float(jnp.minimum(p, q).sum()), abs=2e-6)
        assert (np.diff(found) > -1e-6).all() and found[3] > found[0]


def test_draws_without_replacement_that_leave_a_set_are_those_of_the_closed_form():
    """Two draws: 1 - sum over i in H of q_i (q(H) - q_i) / (1 - q_i), also where the second is a thousand times rarer."""
    for q in (np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.999, 9e-4, 9e-5, 1e-5])):
        found = jax.jit(multidraft._leaves, static_argnums=1)(single(q), 2)
        ends = range(1, len(q) + 1)
        closed = [1 - sum(q[i] * (q[:k].sum() - q[i]) / (1 - q[i]) for i in range(k)) for k in ends]
        np.testing.assert_allclose(found, closed, atol=2e-6)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_drafts_are_drawn_from_what_the_scheme_says(scheme, number):
    """Each as often as it should be, within five deviations, and with the distributions that it was drawn from."""
    rows, vocab = 8000, 4
    draws = jax.jit(jax.vmap(partial(SCHEMES[scheme].draw, number=number), (0, None, None)))
    keys = jax.random.split(jax.random.key(number), rows)
    for name, (_, q) in pairs(vocab).items():
        tokens, log_q = draws(keys, jnp.log(single(q)), -jnp.arange(vocab, dtype=jnp.float32))
        every = {own: (mass, laws) for own, mass, laws in every_draw(q, number, scheme) if mass > 0}
        drawn = [tuple(row) for row in np.asarray(tokens).tolist()]
        assert set(drawn) <= every.keys(), name
        for own, at in {own: at for at, own in enumerate(drawn)}.items():
            np.testing.assert_allclose(np.exp(log_q[at]), every[own][1], atol=1e-6, err_msg=name)
        seen = np.array([drawn.count(own) for own in every])
        found, most = chi_square(seen, rows * np.array([mass for mass, _ in every.values()]))
        assert found < most or len(every) == 1, name


def test_the_first_draft_without_replacement_is_the_draw_of_its_key():
    """On which Gumbel coupling rests."""
    log_q = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (20,)))
    for i in range(20):
        tokens, _ = SCHEMES["without-replacement"].draw(jax.random.key(i), log_q, log_q, 3)
        assert int(tokens[0]) == int(draw(jax.random.key(i), log_q))


@partial(jax.jit, static_argnums=0)
def node_laws(rule: str, tokens, log_q, log_p) -> jax.Array:
    """`[draws, V]` law of the token after the one window row on which all drafts hang; the drafts' own rows do not matter."""

    def law(tokens, log_q):
        number = tokens.shape[0]
        draft = Draft(tokens, jnp.int32(number), log_q, jnp.zeros(number, jnp.int32))
        return verify.RULES[rule].law(draft, jnp.broadcast_to(log_p, (number + 1, *log_p.shape)))[0]

    return jax.vmap(law)(tokens, log_q)


def summed(scheme: str, rule: str, p, q, number: int) -> tuple[np.ndarray, float]:
    """The law of the token over all drafts, and how likely it is one of them."""
    every = [(tokens, mass, laws) for tokens, mass, laws in every_draw(q, number, scheme) if mass > 0]
    padded = [*every, *[every[0]] * (len(p) ** number - len(every))]  # one program a size
    tokens, _, laws = zip(*padded, strict=True)
    with np.errstate(divide="ignore"):
        log_q, log_p = single(np.log(np.array(laws))), single(np.log(p))
    found = np.asarray(node_laws(rule, jnp.array(tokens, jnp.int32), log_q, log_p), np.float64)
    mass = np.array([own[1] for own in every])
    kept = [found[i, list(set(own[0]))].sum() for i, own in enumerate(every)]
    return mass @ found[: len(every)], float(mass @ kept)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("scheme, rule", EXACT)
def test_every_rule_leaves_the_targets_law_and_accepts_no_more_than_the_optimum(scheme, rule, number):
    for vocab in (3, 4):
        for name, (p, q) in pairs(vocab).items():
            found, kept = summed(scheme, rule, p, q, number)
            np.testing.assert_allclose(found, p, atol=2e-6, err_msg=f"{vocab} {name}")
            if scheme == "with-replacement" or np.count_nonzero(q) >= number:
                most = float(optimum(number, scheme)(single(p), single(q)))
                assert kept <= most + 3e-6, (vocab, name)
                best = number == 1 or scheme == rule == "greedy-drafts"
                assert not best or kept == pytest.approx(most, abs=3e-6), (vocab, name)


@pytest.mark.parametrize("number", [2, 3])
def test_k_seq_accepts_as_much_as_its_least_factor_lets_it(number):
    """That factor is where 1 - (1 - beta) ** n = rho beta; what is drawn after all drafts failed may be one of them, too."""
    accepts = lambda beta: 1 - (1 - beta) ** number
    for name, (p, q) in pairs(4).items():
        beta = lambda rho, p=p, q=q: np.minimum(q, p / rho).sum()
        lacks = lambda rho, beta=beta: rho * beta(rho) - accepts(beta(rho))
        rho = brentq(lacks, 1, number) if lacks(1) < -1e-9 < 1e-9 < lacks(number) else 1.0
        _, kept = summed("with-replacement", "k-seq", p, q, number)
        assert kept >= accepts(beta(rho)) - 1e-5, name


@partial(jax.jit, static_argnums=0)
def rows_of(rule: str, draft: Draft, log_p) -> jax.Array:
    return verify.RULES[rule].law(draft, log_p)


def test_on_a_chain_recursive_rejection_is_rejection():
    rng = np.random.default_rng(3)
    log_p, log_q = (jax.nn.log_softmax(single(rng.normal(size=(rows, 5)))) for rows in (4, 3))
    for num_drafted in range(4):
        draft = Draft(jnp.array([1, 4, 0]), jnp.int32(num_drafted), log_q)
        expected = verify.rejection.law(draft, log_p)
        for rule in ("recursive", "greedy-drafts", "k-seq"):
            np.testing.assert_allclose(rows_of(rule, draft, log_p), expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["recursive", "k-seq", "greedy-drafts"])
def test_drafts_that_do_not_count_change_nothing(rule):
    """A tree of which some nodes are masked is the tree without them."""
    rng = np.random.default_rng(4)
    log_p = jax.nn.log_softmax(single(rng.normal(size=(5, 4))))
    log_q = jnp.repeat(jax.nn.log_softmax(single(rng.normal(size=(2, 4)))), 2, axis=0)
    tree = Draft(jnp.array([1, 2, 0, 0]), jnp.int32(4), log_q, jnp.array([0, 0, 1, 1]))
    for number in range(5):
        masked = rows_of(rule, tree._replace(num_drafted=jnp.int32(number)), log_p)
        if number == 0:
            np.testing.assert_allclose(masked, jnp.exp(log_p), atol=1e-6)
            continue
        cut = Draft(tree.tokens[:number], jnp.int32(number), log_q[:number], tree.parents[:number])
        alone = rows_of(rule, cut, log_p[: number + 1])
        np.testing.assert_allclose(masked[: number + 1], alone, atol=1e-6)
        np.testing.assert_allclose(masked[number + 1 :], jnp.exp(log_p[number + 1 :]), atol=1e-6)
