"""A chain with siblings: its caches, its text and its acceptance, on a small transformer.

Verification hides drafting bugs: a broken drafter is slow, never wrong. So it is run where it must be perfect, and where it
is right now and then its counts equal a recomputation along the text.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, EOS, NEAR, PARAMS, PROMPTS, TARGET, answer, engine, plain_greedy
from test_gumbel import silent
from test_lossless import chi_square
from toys import decode, prompt_of, random_table, table_target

from jaxspec import metrics, verify
from jaxspec.drafters import multi_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.drafters.multi import first_goes_on
from jaxspec.multidraft import SCHEMES
from jaxspec.sampling import log_probs
from jaxspec.speculate import speculator
from jaxspec.transformer import forward, unembed
from jaxspec.types import Draft, Drafter, Sampling

PAIRS = [
    ("with-replacement", "recursive"),
    ("with-replacement", "k-seq"),
    ("without-replacement", "recursive"),
    ("greedy-drafts", "greedy-drafts"),
]


@cache
def programs(k: int, drafts: int, scheme: str, rule: str):
    return engine(multi_drafter(TARGET, k, drafts, scheme), verify.RULES[rule], stops=(EOS,) if k == 3 else ())


@pytest.mark.parametrize(
    ("scheme", "rule", "temperature"),
    [
        pytest.param(*pair, temperature, marks=pytest.mark.slow if temperature == 0 and pair != PAIRS[0] else ())
        for pair in PAIRS
        for temperature in (0.0, 1.0)
    ],
)
def test_a_drafter_that_is_the_target_loses_nothing(scheme, rule, temperature):
    """One draft of every place is accepted; of greedy drafts not always the first, which goes on: they are of one place."""
    k = 1 if scheme == "greedy-drafts" else 2
    done = answer(programs(k, 2, scheme, rule), LMDrafterParams(PARAMS), temperature=temperature)
    assert metrics.total(own.counts for own in done).num_drafts == 4 * -(-BUDGET // (k + 1))


@cache
def guesses(text: tuple[int, ...], number: int) -> np.ndarray:
    """`[places, n]` the tokens that NEAR finds likeliest after each place, read from scratch."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(_likeliest(NEAR, padded, number))


@jax.jit
def _logits(params, text):
    return unembed(TARGET, params, forward(TARGET, params, text))[0]


def _likeliest(params, text, number):
    return jax.lax.top_k(_logits(params, text), number)[1]


def recomputed(ids, out, k: int, number: int) -> list[int]:
    """Accepted tokens of every round along an output; a sibling is accepted where nothing follows it."""
    said, rounds, at = guesses((*ids, *out), number), [], 0
    while at < len(out):
        kept = 0
        while kept < k and at + kept < len(out):
            drafts = said[len(ids) + at + kept - 1].tolist()
            if out[at + kept] not in drafts:
                break
            kept += 1
            if out[at + kept - 1] != drafts[0]:
                break
        rounds.append(kept)
        at += kept + 1
    return rounds


@pytest.mark.parametrize("k, number", [(3, 2), (2, 3)])
def test_text_is_plain_decodings_and_acceptance_that_of_a_recomputation(k, number):
    """Rounds go on after accepted siblings, which the drafter's cache does not hold."""
    program = programs(k, number, "greedy-drafts", "greedy")
    seen = []
    for done, ids in zip(answer(program, LMDrafterParams(NEAR)), PROMPTS, strict=True):
        assert done.ids == plain_greedy(ids, stop=EOS if k == 3 else None)
        rounds = recomputed(ids, done.ids, k, number)
        assert done.counts.num_drafts == len(rounds)
        assert (
            done.counts.num_accepted_tokens >= sum(rounds) > 0
        )  # the last block is cut, the rule's count of it is not
        assert done.counts.num_accepted_tokens - sum(rounds) <= k
        seen += rounds
    chain = [len(recomputed(ids, plain_greedy(ids), k, 1)) for ids in PROMPTS]
    assert len(seen) < sum(chain)


def test_under_gumbel_coupling_the_text_is_that_of_the_noise():
    cut = {"temperature": 0.9, "top_k": 12, "top_p": 0.8}
    own = engine(multi_drafter(TARGET, 2, 2, "without-replacement"), verify.gumbel, stops=())
    found = answer(own, LMDrafterParams(NEAR), **cut)
    assert [done.ids for done in found] == [done.ids for done in answer(silent(5), (), **cut)]
    drafted, accepted = (metrics.total(done.counts for done in found)[i] for i in (1, 2))
    assert accepted > 0.2 * drafted


def table_multi(k: int, drafts: int, scheme: str) -> Drafter:
    """As `multi_drafter` with a table for a model."""
    draw = SCHEMES[scheme].draw

    def propose(table, state, tokens, length, noise, sampling):
        last = jnp.take_along_axis(tokens, length[:, None] - 1, 1)[:, 0]
        said = []
        for step in range(k):
            log_q = log_probs(table[last], sampling)
            said.append(jax.vmap(lambda *own: draw(*own, drafts))(noise(step), log_q, table[last]))
            last = said[-1][0][:, 0]
        drafted, log_q = (jnp.concatenate(leaf, 1) for leaf in zip(*said, strict=True))
        parents = jnp.broadcast_to(first_goes_on(k, drafts), drafted.shape)
        return Draft(drafted, jnp.full(length.shape, k * drafts, jnp.int32), log_q, parents), state

    keep = lambda params, state, verdict, scores: state
    return Drafter(k * drafts, lambda table, prompt, slots: (), propose, keep)


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("scheme, rule", PAIRS)
def test_the_loop_samples_from_the_target(scheme, rule, k):
    """Three tokens of many rows against p(a) p(b|a) p(c|b): chi-square within five deviations."""
    rows, vocab = 20_000, 3
    target, drafter = random_table(5, vocab), random_table(6, vocab)
    spec = speculator(table_target(), table_multi(k, 2, scheme), verify.RULES[rule], stop_tokens=())
    sampling = Sampling(jnp.full(rows, 0.9, jnp.float32))
    state = decode(spec, target, drafter, prompt_of(np.zeros((rows, 2)), limit=3), sampling)
    seen = np.zeros((vocab,) * 3)
    np.add.at(seen, tuple(np.asarray(state.tokens[:, 2:5]).T), 1)
    p = np.exp(np.asarray(log_probs(jnp.asarray(target)[None], Sampling(np.full(1, 0.9, np.float32))))[0])
    found, most = chi_square(seen, rows * p[0][:, None, None] * p[:, :, None] * p[None])
    assert found < most
