"""Emitted tokens follow the target exactly, whatever the drafter says: by enumeration, and by sampling the real loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import prompt_of, random_table, table_drafter, table_target

from jaxspec import verify
from jaxspec.sampling import log_probs
from jaxspec.speculate import speculator
from jaxspec.types import Draft, Sampling, SpecParams

SETTINGS = {
    "plain": Sampling(np.ones(1, np.float32)),
    "cold": Sampling(np.full(1, 0.3, np.float32)),
    "greedy": Sampling(np.zeros(1, np.float32)),
    "top-k": Sampling(np.ones(1, np.float32), top_k=np.full(1, 2, np.int32)),
    "top-p": Sampling(np.full(1, 0.8, np.float32), top_p=np.full(1, 0.6, np.float32)),
}


def markov(table, sampling) -> np.ndarray:
    """Exact next-token distributions `[V, V]` after temperature, top-k and top-p."""
    return np.exp(np.asarray(log_probs(jnp.asarray(table)[None], sampling))[0].astype(np.float64))


def chain(p: np.ndarray, start: int, tokens) -> float:
    return float(np.prod([p[a, b] for a, b in zip((start, *tokens), tokens)]))


def law_of_round(law, p, q, k: int, start: int, deterministic: bool) -> dict[tuple, float]:
    """The law of K + 1 tokens: one round of the shipped rule, completed by the target's own law; nothing is sampled."""
    vocab = len(p)
    drafts = list(itertools.product(range(vocab), repeat=k))
    if deterministic:
        drafts = [tuple(greedy_chain(q, start, k))]
    total = dict.fromkeys(itertools.product(range(vocab), repeat=k + 1), 0.0)
    for drafted in drafts:
        weight = 1.0 if deterministic else chain(q, start, drafted)
        contexts = np.array([start, *drafted])
        log_q = None if deterministic else jnp.log(jnp.asarray(q[contexts[:-1]], jnp.float32))
        draft = Draft(jnp.asarray(drafted, jnp.int32).reshape(k), jnp.int32(k), log_q)
        rows = np.asarray(law(draft, jnp.log(jnp.asarray(p[contexts], jnp.float32))), np.float64)
        for out in total:
            total[out] += weight * emission(rows, p, drafted, out)
    return total


def emission(rows, p, drafted, out) -> float:
    mass = 1.0
    for i, token in enumerate(out):
        mass *= rows[i, token]
        if i == len(drafted) or token != drafted[i]:
            return mass * chain(p, token, out[i + 1 :])
    return mass


def greedy_chain(q, start: int, k: int):
    for _ in range(k):
        start = int(np.argmax(q[start]))
        yield start


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_one_round_has_the_targets_law(k, name, deterministic):
    for vocab, seed in ((2, 0), (3, 1)):
        p = markov(random_table(seed, vocab), SETTINGS[name])
        q = markov(random_table(seed + 10, vocab), SETTINGS[name])
        found = law_of_round(verify.rejection, p, q, k, 0, deterministic)
        for out, mass in found.items():
            assert mass == pytest.approx(chain(p, 0, out), abs=1e-6)


@pytest.mark.parametrize("num_drafted", [0, 1, 2])
def test_masked_drafts_do_not_count(num_drafted):
    p, q = (markov(random_table(s, 3), SETTINGS["plain"]) for s in (3, 4))
    contexts = np.array([0, 1, 2, 0])
    draft = Draft(jnp.array([1, 2, 0]), jnp.int32(num_drafted), jnp.log(jnp.asarray(q[contexts[:-1]], jnp.float32)))
    rows = verify.rejection(draft, jnp.log(jnp.asarray(p[contexts], jnp.float32)))
    np.testing.assert_allclose(rows[num_drafted:], p[contexts][num_drafted:], atol=1e-6)
    verdict = verify.walk(jax.random.key(0), draft, jax.nn.one_hot(jnp.array([1, 2, 0, 1]), 3))
    assert int(verdict.num_accepted) == num_drafted


def test_a_zero_residual_is_no_division_by_zero():
    p = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    draft = Draft(jnp.array([0]), jnp.int32(1), jnp.log(p[:1]))
    rows = verify.rejection(draft, jnp.log(p))
    np.testing.assert_allclose(rows, [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], atol=1e-7)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_loop_samples_from_the_target(k, deterministic):
    """The first two tokens of many rows against p(a) p(b|a): chi-square within five deviations; k = 1 meets the bonus."""
    rows, vocab = 20_000, 4
    target, drafter = random_table(5, vocab), random_table(6, vocab)
    spec = speculator(table_target(), table_drafter(k, deterministic), verify.rejection, stop_tokens=())
    prompt = prompt_of(np.zeros((rows, 2)), limit=2)
    sampling = Sampling(jnp.full(rows, 0.9, jnp.float32))
    params = SpecParams(jnp.asarray(target), jnp.asarray(drafter))
    step = jax.jit(spec.step)
    state = spec.init(params, prompt, (), sampling, 2 + 2 + k + 1)
    while not bool(state.done.all()):
        state, _ = step(params, state)
    tokens = np.asarray(state.tokens[:, 2:4])
    p = markov(target, Sampling(np.full(1, 0.9, np.float32)))
    expected = rows * p[0][:, None] * p
    seen = np.zeros((vocab, vocab))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    freedom = vocab * vocab - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_a_draft_that_follows_the_target_is_always_kept():
    vocab, k = 5, 3
    table = jnp.asarray(random_table(7, vocab))
    spec = speculator(table_target(), table_drafter(k), verify.rejection, stop_tokens=())
    state = spec.init(SpecParams(table, table), prompt_of(np.zeros((64, 2)), limit=30), (), Sampling(jnp.ones(64)), 64)
    for _ in range(5):
        state, info = spec.step(SpecParams(table, table), state)
        assert (info.num_accepted == k).all()


def test_a_tree_walk_descends_along_drawn_children():
    """Root 0 -> nodes a(1), b(2); b -> c(3): parents are window rows."""
    draft = Draft(jnp.array([5, 6, 7]), jnp.int32(3), None, jnp.array([0, 0, 2]))
    verdict = verify.walk(None, draft, jax.nn.one_hot(jnp.array([6, 0, 7, 9]), 10))
    assert verdict.tokens[: int(verdict.num_emitted)].tolist() == [6, 7, 9]
    assert verdict.path[:3].tolist() == [0, 2, 3]
    assert int(verdict.num_accepted) == 2
