"""The law of teacher forcing: rounds read off a finished text are the rounds that the engine had there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, NEAR, NEARLY, PARAMS, PROMPTS, TARGET, answer, engine

from jaxspec import forced, metrics, verify
from jaxspec.drafters import ngram_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.requests import MAX_DRAFT
from jaxspec.store.traces import Traces
from jaxspec.types import Draft

BEST = jax.jit(partial(forced.greedy, TARGET, vocab_size=TARGET.vocab_size))


@pytest.fixture(scope="module")
def texts():
    """Greedy texts of the target by speculation, and the engine's counts of each."""
    return answer(NEARLY, LMDrafterParams(NEAR))


def traces(texts) -> Traces:
    """The texts as a trace holds them, of whose distributions the best token is all that is needed."""
    tokens = [np.array([*prompt, *text.ids], np.int32) for prompt, text in zip(PROMPTS, texts, strict=True)]
    best = np.zeros((len(texts), BUDGET, 1), np.int32)
    for row, text in zip(best, texts, strict=True):
        row[: len(text.ids), 0] = text.ids
    nothing = np.zeros((len(texts), BUDGET))
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    return Traces([], tokens, lengths, best, nothing[..., None], nothing, nothing, nothing, nothing, {})


@pytest.mark.parametrize("row_tokens", [64, 48])
def test_rounds_of_a_text_are_those_that_the_engine_counted(texts, row_tokens):
    agree = forced.agreements(partial(BEST, NEAR), traces(texts), [2, 0, 3, 1], row_tokens)
    for i, own in zip([2, 0, 3, 1], agree, strict=True):
        rounds = forced.chain(forced.agreeing(own), 3)
        counts = texts[i].counts
        assert rounds.rounds == counts.num_drafts
        assert rounds.drafted == counts.drafted_by_position.sum()
        assert rounds.accepted == counts.accepted_by_position.sum()
    assert 0 < sum(map(np.sum, agree)) < sum(map(len, agree))  # else the law says little
    whole = metrics.measures(metrics.total([text.counts for text in texts]))
    assert forced.acceptance_length([forced.agreeing(own) for own in agree], 3) == pytest.approx(
        whole["mean_acceptance_length"]
    )


def test_the_target_as_its_own_drafter_agrees_everywhere(texts):
    agree = forced.agreements(partial(BEST, PARAMS), traces(texts), range(4), 64)
    assert all(own.all() for own in agree)


def test_lookups_along_a_text_are_those_that_the_engine_made():
    looks_up = engine(ngram_drafter(3))
    found = answer(looks_up, ())
    runs = forced.lookups(ngram_drafter(MAX_DRAFT), traces(found), range(4))
    for run, text in zip(runs, found, strict=True):
        rounds = forced.chain(run[:, 3], 3)
        assert rounds.rounds == text.counts.num_drafts
        assert rounds.accepted == text.counts.accepted_by_position.sum()
    assert sum(text.counts.num_accepted_tokens for text in found) > 0  # else the law says little


def test_as_much_of_a_tree_is_reached_as_the_walk_goes():
    """The shipped walk along trees drawn by chance, of which the first nodes are drafted and the target says one text."""
    rng, nodes = np.random.default_rng(0), 8
    walked = jax.jit(lambda draft, law: verify.walk(None, draft, law).num_accepted)
    far = []
    for _ in range(40):
        parents = np.array([rng.integers(n + 1) for n in range(nodes)])
        rank = np.array([(parents[:n] == parents[n]).sum() for n in range(nodes)])  # no two siblings are alike
        draft, says = Draft(rank, np.int32(rng.integers(nodes + 1)), None, parents), rng.integers(2, size=nodes + 1)
        depth = verify.depths(draft)
        whole = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], draft)
        reach = forced.reached(whole, (rank == says[np.asarray(depth)[1:] - 1])[None])[0]
        law = jax.nn.one_hot(says[np.asarray(depth)], nodes)
        for number in range(nodes + 1):
            fewer = draft._replace(num_drafted=np.minimum(draft.num_drafted, number))
            far.append(int(walked(fewer, law)))
            assert np.asarray(reach[number]).tolist() == [float(far[-1] >= n) for n in range(nodes + 1)]
    assert max(far) > 2


@pytest.mark.parametrize(
    ("agrees", "k", "expected"),
    [
        ([1, 1, 1, 1, 1], 3, (2, 4, 4)),
        ([0, 1, 0, 1, 1, 1, 1], 3, (3, 9, 4)),
        ([0, 0, 0], 2, (3, 5, 0)),
        ([1, 1, 1], 0, (3, 0, 0)),
        ([1], 4, (1, 1, 1)),
        ([], 4, (0, 0, 0)),
    ],
)
def test_rounds_by_hand(agrees, k, expected):
    assert tuple(forced.chain(forced.agreeing(np.array(agrees, bool)), k)) == expected
