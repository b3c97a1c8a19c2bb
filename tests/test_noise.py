"""Noise belongs to a request and a place in its text, and what it draws follows the distributions that are reported."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import DRAFT, PARAMS, SMALL, TARGET
from toys import decode, every_setting, prompt_of, random_table, table_drafter, table_target

from jaxspec import verify
from jaxspec.drafters import lm_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.sampling import DRAFT as DRAFTER
from jaxspec.sampling import VERIFY, log_probs, of_the_round, of_the_token
from jaxspec.speculate import speculator
from jaxspec.target import lm_target
from jaxspec.types import Prompt, Sampling, SpecParams

VOCAB, K, ROWS, LIMIT = 5, 3, 20, 12
RULES = {"rejection": verify.rejection, "gumbel": verify.gumbel}
SLOTS = 32


def at_slots(prompt: Prompt, sampling: Sampling, rows) -> tuple[Prompt, Sampling]:
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], (prompt, sampling))


@pytest.mark.parametrize("rule", RULES)
def test_a_request_names_its_text_at_any_slot_with_any_neighbours(rule):
    spec = speculator(table_target(), table_drafter(K), RULES[rule], stop_tokens=())
    prompt = prompt_of(np.arange(2 * ROWS).reshape(ROWS, 2) % VOCAB, limit=LIMIT)
    batch = prompt._replace(draft_limit=jnp.arange(ROWS) % (K + 1)), every_setting(ROWS, VOCAB)
    text = lambda rows: np.asarray(
        decode(spec, random_table(1, VOCAB), random_table(2, VOCAB), *at_slots(*batch, rows)).tokens
    )
    in_order = text(np.arange(ROWS))
    shuffled = np.random.default_rng(0).permutation(ROWS)
    repeated = np.random.default_rng(1).integers(0, ROWS, ROWS)
    for rows in (shuffled, repeated):
        np.testing.assert_array_equal(text(rows), in_order[rows])
    assert len(np.unique(in_order[:, 2:], axis=0)) > ROWS // 2


def test_no_noise_of_a_round_is_used_twice():
    draws = itertools.product(range(8), (DRAFTER, VERIFY), range(5))
    keys = [tuple(jax.random.key_data(of_the_round(jax.random.key(3), at, role, n, n))) for at, role, n in draws]
    assert len({tuple(map(int, key)) for key in keys}) == 8 * 2 * 5


def test_noise_of_a_token_is_shared_by_role_node_and_round_and_by_nothing_else():
    data = lambda *draw: tuple(map(int, jax.random.key_data(of_the_token(jax.random.key(3), *draw))))
    assert data(4, DRAFTER, 2, 2) == data(4, VERIFY, 7, 2) == data(6, VERIFY, 0, 0)
    assert len({data(at, VERIFY, 0, 0) for at in range(64)}) == 64


def proposed(drafter, params, prompt: Prompt, sampling, rule):
    """One draft of every row, by the noise that a speculator hands to its drafter."""
    spec = speculator(lm_target(TARGET), drafter, rule, stop_tokens=())
    params = SpecParams(PARAMS, params)

    def one_round():
        state, _ = lm_target(TARGET).init(PARAMS, prompt, SLOTS)
        return spec.step(params, spec.init(params, prompt, state, sampling, SLOTS))[1]

    return jax.jit(one_round)()


@pytest.mark.parametrize("rule", RULES)
def test_drafted_tokens_follow_the_reported_q(rule):
    """Of an LM and, for each node, over its rows: chi-square within five deviations, rare tokens taken together."""
    rows = 2_000
    sampling = Sampling(jnp.full(rows, 0.2), jnp.full(rows, 20), jnp.full(rows, 0.9))
    prompt = prompt_of(np.tile([[9, 11]], (rows, 1)), limit=8)
    draft = proposed(lm_drafter(SMALL, K), LMDrafterParams(DRAFT), prompt, sampling, RULES[rule]).draft
    for node in range(K):
        expected = np.exp(np.asarray(draft.log_q[:, node], np.float64)).sum(0)
        seen = np.bincount(np.asarray(draft.tokens[:, node]), minlength=len(expected))
        assert seen[expected == 0].sum() == 0
        rare = expected < 5
        pooled = lambda counts, rare=rare: np.append(counts[~rare], counts[rare].sum())
        seen, expected = pooled(seen), pooled(expected) + 1e-9
        freedom = len(seen) - 1
        assert ((seen - expected) ** 2 / expected)[expected > 1].sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_p_and_q_are_float32_whatever_the_models_are():
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    prompt, sampling = prompt_of([[1, 2], [3, 4]], limit=5), Sampling(jnp.ones(2))
    target, drafter = lm_target(TARGET, jnp.bfloat16), lm_drafter(SMALL, 2, dtype=jnp.bfloat16)
    spec = speculator(target, drafter, verify.rejection, stop_tokens=())
    params = SpecParams(low(PARAMS), LMDrafterParams(low(DRAFT)))

    def one_round():
        state, _ = target.init(params.target, prompt, SLOTS)
        return spec.step(params, spec.init(params, prompt, state, sampling, SLOTS))[1]

    info = jax.eval_shape(one_round)
    assert {info.draft.log_q.dtype, info.scores.log_p.dtype, info.scores.logits.dtype} == {jnp.dtype("float32")}


def test_columns_that_keep_everything_change_nothing():
    logits = jnp.asarray(random_table(0, 7)[None].repeat(3, 0))
    temperature = jnp.array([1.0, 0.4, 0.0])
    all_kept = Sampling(temperature, jnp.full(3, 7), jnp.ones(3))
    expected = log_probs(logits, Sampling(temperature))
    np.testing.assert_array_equal(log_probs(logits, all_kept), expected)
    np.testing.assert_array_equal(log_probs(logits, all_kept._replace(top_p=None)), expected)
    np.testing.assert_array_equal(log_probs(logits, all_kept._replace(top_k=None)), expected)


def test_a_row_that_cuts_leaves_its_neighbours_as_they_are():
    logits = jnp.asarray(random_table(0, 7)[None].repeat(4, 0))
    temperature = jnp.array([1.0, 1.0, 1.0, 0.0])
    mixed = log_probs(logits, Sampling(temperature, jnp.array([7, 2, 7, 2]), jnp.array([1.0, 1.0, 0.5, 0.5])))
    alone = lambda row, **columns: log_probs(logits[row:][:1], Sampling(temperature[row:][:1], **columns))[0]
    np.testing.assert_array_equal(mixed[0], alone(0))
    np.testing.assert_array_equal(mixed[1], alone(1, top_k=jnp.array([2])))
    np.testing.assert_array_equal(mixed[2], alone(2, top_p=jnp.array([0.5])))
    np.testing.assert_array_equal(mixed[3], alone(3))


def test_only_a_branch_searches():
    """So that rows of all settings share a program at no cost to those without top-k and top-p."""
    columns = Sampling(jnp.ones(2), jnp.full(2, 7), jnp.ones(2))
    program = jax.make_jaxpr(lambda logits: log_probs(logits, columns))(jnp.zeros((2, 3, 7)))
    outside = [equation.primitive.name for equation in program.eqns]
    assert "cond" in outside and "top_k" not in str([e for e in program.eqns if e.primitive.name != "cond"])
    assert "top_k" in str(program)
