"""Recorded log probabilities equal those of the finished text, read in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, DRAFT, EOS, PARAMS, PROMPTS, SMALL, TARGET, answer, programs
from toys import every_setting, prompt_of, random_table, table_target, table_tree

from jaxspec import verify
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.recording import logprobs, place
from jaxspec.sampling import log_probs
from jaxspec.speculate import run, speculator
from jaxspec.transformer import forward, unembed
from jaxspec.types import Sampling, SpecParams

SAMPLED = {"temperature": 0.7, "top_k": 12, "top_p": 0.9}
CASES = {"greedy": {}, "rejection": SAMPLED, "gumbel": SAMPLED}


@jax.jit
def teacher_forced(text):
    """`[n, V]` logits after every token of one text."""
    return unembed(TARGET, PARAMS, forward(TARGET, PARAMS, text[None]))[0]


def of_text(ids, out, settings):
    """The log probabilities of `out` after `ids`: raw, and under the settings."""
    text = np.zeros(48, np.int32)
    text[: len(ids) + len(out)] = [*ids, *out]
    logits = teacher_forced(text)[len(ids) - 1 : len(ids) + len(out) - 1]
    one = lambda name, dtype: None if name not in settings else np.full(1, settings[name], dtype)
    columns = one("temperature", np.float32), one("top_k", np.int32), one("top_p", np.float32)
    sampling = Sampling(*columns) if settings else None
    pick = lambda log_p: np.asarray(log_p)[np.arange(len(out)), out]
    return pick(jax.nn.log_softmax(logits)), pick(log_probs(logits[None], sampling)[0])


@pytest.mark.parametrize("rule", CASES)
def test_logprobs_equal_teacher_forcing(rule):
    """Under speculation, with stops inside blocks; nothing is recorded past the end."""
    program = programs(SMALL, 3, getattr(verify, rule), stops=(EOS, 20, 30), recorder=logprobs(BUDGET))
    for ids, completion in zip(PROMPTS, answer(program, LMDrafterParams(DRAFT), **CASES[rule]), strict=True):
        size, record = len(completion.ids), completion.record
        raw, sampled = of_text(ids, completion.ids, CASES[rule])
        np.testing.assert_allclose(record.raw[:size], raw, atol=1e-4)
        np.testing.assert_allclose(record.sampled[:size], sampled, atol=1e-4)
        assert not record.raw[size:].any() and not record.sampled[size:].any()
        assert record.raw.shape == (BUDGET,)
        assert record.raw[0] < 0 and (rule != "greedy" or not record.sampled.any())


def test_logprobs_follow_the_path_of_a_tree():
    vocab, rows, limit, slots = 6, 20, 12, 32
    table = jnp.asarray(random_table(20, vocab))
    spec = speculator(table_target(), table_tree((0, 0, 2)), verify.gumbel, stop_tokens=())
    params, prompt, sampling = (
        SpecParams(table, table),
        prompt_of(np.ones((rows, 1)), limit=limit),
        every_setting(20, 6),
    )
    recorder = logprobs(limit)
    start = spec.init(params, prompt, (), sampling, slots)
    state, record = jax.jit(lambda: run(spec.step, recorder.fold, params, start, recorder.init(prompt)))()
    text = np.asarray(state.tokens[:, : limit + 1])
    rows_of = lambda log_p: np.take_along_axis(np.asarray(log_p), text[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(record.raw, rows_of(jax.nn.log_softmax(table[text[:, :-1]])), atol=1e-5)
    np.testing.assert_allclose(record.sampled, rows_of(log_probs(table[text[:, :-1]], sampling)), atol=1e-5)


def test_what_lies_past_the_room_is_dropped():
    real = jnp.array([[True, True, True], [True, False, False]])
    value = jnp.arange(1.0, 7.0).reshape(2, 3)
    np.testing.assert_array_equal(
        place(jnp.zeros((2, 4)), value, jnp.array([2, 0]), real), [[0, 0, 1, 2], [4, 0, 0, 0]]
    )
