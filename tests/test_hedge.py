"""Rows that choose their drafter as they go: lossless, perfect once they found the perfect one, and Hedge as it is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, EOS, NEAR, PARAMS, PROMPTS, TARGET, _next, answer, engine, plain_greedy
from toys import prompt_of

from jaxspec import verify
from jaxspec.drafters import hedged
from jaxspec.drafters.hedge import leader, prior, rejected, reweighed
from jaxspec.recording import choices
from jaxspec.requests import room_of
from jaxspec.speculate import speculator
from jaxspec.target import lm_target
from jaxspec.transformer import init
from jaxspec.types import Sampling, SpecParams

K, WINDOWS = 3, (4, 9)
FAR, FARTHER = (jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(TARGET, jax.random.key(s))) for s in (9, 10))


def stacked(*weights):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


ALL, HIDDEN = stacked(FAR, NEAR, PARAMS), stacked(FAR, FARTHER, PARAMS)


def own(window, rule=verify.greedy, drafters=3, stops=(), **settings):
    drafter = hedged(TARGET, K, drafters, window=window, **settings)
    return engine(drafter, rule, stops, recorder=choices(drafters))


HEDGE = {4: own(4, stops=(EOS,), rate=0.5, share=0.0), 9: own(9, rate=0.5, share=0.0)}
# A token is enough for these to leave a drafter.
FOUND = {4: own(4, rate=1e6, share=0.0), 9: own(9, verify.rejection, rate=1e6, share=0.0)}


def test_greedy_equals_plain_decoding():
    """While drafters are changed within the text."""
    done = answer(HEDGE[4], ALL, route=[0, 1, -1, 0])
    assert [completion.ids for completion in done] == [plain_greedy(ids) for ids in PROMPTS]
    assert sum((completion.record.rounds > 0).sum() > 1 for completion in done) >= 2
    assert [c.ids for c in answer(HEDGE[4], ALL, draft_limit=0)] == [c.ids for c in done]


@pytest.mark.parametrize("window, temperature", [(4, 0.0), (9, 0.0), (9, 1.0)])
def test_once_the_target_is_among_the_drafters_and_found_nothing_is_lost(window, temperature):
    """Only the rounds before the first full window lose anything; from there on whole blocks are kept."""
    done = answer(FOUND[window], HIDDEN, route=[0, 0, 1, 0], temperature=temperature)
    for completion in done:
        rounds, counts = completion.record.rounds, completion.counts
        others = rounds[:2].sum()
        assert rounds.sum() == counts.num_drafts and 0 < others <= window - K
        assert counts.drafted_by_position.sum() - counts.accepted_by_position.sum() <= K * others
        assert BUDGET - (K + 1) * rounds[2] <= window
        assert counts.num_accepted_tokens >= K * rounds[2]
    assert sum(completion.record.rounds[2] for completion in done) >= 4 * (BUDGET - window) // (K + 1)


def test_under_gumbel_coupling_the_text_does_not_depend_on_who_drafts():
    program = own(4, verify.gumbel, rate=2.0)
    texts = [[c.ids for c in answer(program, ALL, route=route, temperature=1.0)] for route in ([0] * 4, [0, 1, -1, 1])]
    assert texts[0] == texts[1] == [c.ids for c in answer(program, ALL, draft_limit=0, temperature=1.0)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_see_its_batch(temperature):
    """Neither its text nor who drafts for it: rows beside it are judged in other rounds."""
    say = lambda prompts, route: answer(FOUND[9], ALL, prompts, route=route, temperature=temperature)
    together = say(PROMPTS, [0, 1, 0, 1])
    for i, route in ((0, 0), (3, 1)):
        swapped = [PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)]
        again = say(swapped, [route if j == i else -1 for j in range(4)])[i]
        assert again.ids == together[i].ids
        np.testing.assert_array_equal(again.record.rounds, together[i].record.rounds)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_step_preserves_the_type_of_its_state(sampled):
    spec = speculator(lm_target(TARGET), hedged(TARGET, 2, 3), verify.rejection, stop_tokens=(EOS,))
    params, slots = SpecParams(PARAMS, ALL), room_of(3, 5)
    sampling = Sampling(jnp.ones(2)) if sampled else None

    def start():
        prompt = prompt_of([[1, 2, 3], [4, 5, 6]], limit=5)
        return spec.init(params, prompt, lm_target(TARGET).init(PARAMS, prompt, slots)[0], sampling, slots)

    before, after = jax.eval_shape(start), jax.eval_shape(lambda: spec.step(params, start())[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(before))


def losses(ids, out):
    """Greedy disagreement of every drafter along a text, `[D, O]`, read in one pass."""
    text = np.zeros((1, 64), np.int32)
    text[0, : len(ids) + len(out)] = [*ids, *out]
    said = np.array([np.asarray(_next(own, text)) for own in (FAR, NEAR, PARAMS)])
    return said[:, len(ids) - 1 : len(ids) + len(out) - 1] != np.array(out)


@pytest.mark.parametrize("window", WINDOWS)
def test_weights_are_those_of_hedge_along_the_text(window):
    """Whichever drafter drafted: without sharing, windows do not matter, and each token counts once."""
    for ids, completion in zip(PROMPTS, answer(HEDGE[window], ALL, route=0), strict=True):
        before = np.asarray(prior(jnp.array([0]), 3)[0])
        summed = np.cumsum(np.pad(losses(ids, completion.ids), ((0, 0), (1, 0))), axis=1)
        expected = jax.nn.log_softmax(before[:, None] - 0.5 * summed, axis=0)
        apart = np.abs(np.asarray(expected) - completion.record.log_weights[:, None]).max(0)
        assert apart[-window - 1 :].min() < 1e-5


def test_drafters_that_are_alike_leave_the_row_with_its_own():
    for completion in answer(HEDGE[4], stacked(NEAR, NEAR, NEAR), route=[1, -1, 0, 1]):
        used = np.flatnonzero(completion.record.rounds)
        assert used.tolist() == [completion.route % 3]
    for choice in (0, 1):  # of two drafters each begins with half of the weight
        assert int(leader(prior(jnp.array([choice]), 2), jnp.array([choice]))[0]) == choice


def test_a_tokens_loss_is_the_rejection_rate_in_the_mean():
    p, q = (jax.nn.log_softmax(2 * np.random.default_rng(seed).normal(size=(5, 7))) for seed in (0, 1))
    mean = (np.exp(p) * rejected(p, q)).sum(-1)
    np.testing.assert_allclose(mean, 1 - np.minimum(np.exp(p), np.exp(q)).sum(-1), atol=1e-6)


def test_sharing_follows_a_text_that_changes_its_task():
    """A hundred tokens for one drafter, then for the other: found again in some tokens, not in a hundred."""

    def tokens_to_switch(share):
        weights, choice = prior(jnp.array([1]), 2), jnp.array([1])
        for token in range(200):
            loss = jnp.array([[1.0, 0.0]]) if token < 100 else jnp.array([[0.0, 1.0]])
            weights = reweighed(weights, loss, jnp.array([1]), rate=1.0, share=share)
            choice = leader(weights, choice)
            if token >= 100 and int(choice[0]) == 0:
                return token - 99
        return 100

    assert tokens_to_switch(0.01) <= 7 and tokens_to_switch(0.0) >= 99
    np.testing.assert_allclose(np.exp(prior(jnp.array([2]), 5))[0], [0.125, 0.125, 0.5, 0.125, 0.125], atol=1e-6)
