"""Merged trees: two models' trees under one root, what both have met once, and the likeliest of them on average.

The laws that they share with trees are in `test_tree.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import PARAMS, PROMPTS, TARGET, answer, plain_greedy
from test_tree import BEAM, DEPTH, FEW, FEW_OTHER, FEW_PARAMS, NODES, SLOTS, program
from toys import prompt_of

from jaxspec.drafters import merged_tree_drafter, tree_drafter
from jaxspec.drafters.beam import met, search
from jaxspec.drafters.lm import LMDrafterParams, begin, model
from jaxspec.drafters.merged_trees import levels, united
from jaxspec.drafters.tree import candidates

PROMPT = prompt_of(np.random.default_rng(1).integers(FEW.vocab_size, size=(6, 5)), limit=1)
TEXT = jnp.pad(PROMPT.tokens, ((0, 0), (0, SLOTS - 5)))
TWO = LMDrafterParams(FEW_PARAMS), LMDrafterParams(FEW_OTHER)


def test_a_second_drafter_that_is_the_target_loses_nothing():
    """Sure of itself beside one that finds everything equally likely, so that its chain is among what is verified."""
    sure = PARAMS | {"head": {"kernel": 1000 * PARAMS["head"]["kernel"]}}
    both = LMDrafterParams(jax.tree.map(jnp.zeros_like, PARAMS)), LMDrafterParams(sure)
    for own, ids in zip(answer(program("merged trees"), both), PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        assert own.counts.num_drafts == -(-len(own.ids) // (DEPTH + 1))


@jax.jit
def grown() -> tuple:
    """Each model's candidates, and both as one."""
    found = []
    for own in TWO:
        state = begin(FEW, own, PROMPT, SLOTS + (DEPTH - 1) * BEAM, jnp.float32)
        beam = search(*model(FEW, own, None), state.cache, TEXT, PROMPT.length, depth=DEPTH, beam=BEAM)[0]
        found.append(candidates(beam))
    return *found, united(*found, levels(DEPTH, BEAM))


def by_path(found, row: int) -> dict[tuple[int, ...], float]:
    """Scores by the tokens that lead to each candidate that has one."""
    path, said = {0: ()}, {}
    for node in range(1, found.tokens.shape[1]):
        path[node] = (*path[int(found.parent[row, node])], int(found.tokens[row, node]))
        if found.score[row, node] > -np.inf:
            assert path[node] not in said
            said[path[node]] = float(found.score[row, node])
    return said


def test_a_path_that_both_have_met_stands_once_with_the_mean_of_its_probabilities():
    one, other, both = jax.tree.map(np.asarray, grown())
    shared = 0
    for row in range(6):
        first, second, found = (by_path(own, row) for own in (one, other, both))
        greedy = {path for path, score in found.items() if score == np.inf}
        assert len(greedy) == DEPTH and greedy <= first.keys()
        assert found.keys() == first.keys() | second.keys()
        for path in found.keys() - greedy:
            mean = np.mean([np.exp(own.get(path, -np.inf)) for own in (first, second)])
            np.testing.assert_allclose(np.exp(found[path]), mean, rtol=1e-4)
        shared += len(first.keys() & second.keys() - greedy)
        above = np.take_along_axis(both.score, both.parent, axis=1)
        assert (both.score <= above).all()
    assert 0 < shared < 6 * met(DEPTH, BEAM)


def test_what_is_verified_are_the_best_of_both():
    own = merged_tree_drafter(FEW, NODES, depth=DEPTH, beam=BEAM)
    propose = lambda: own.propose(TWO, own.init(TWO, PROMPT, SLOTS), TEXT, PROMPT.length, None, None)[0]
    draft, both = (jax.tree.map(np.asarray, tree) for tree in (jax.jit(propose)(), grown()[2]))
    from_second = 0
    for row in range(6):
        found, paths = by_path(both, row), [()]
        for parent, token in zip(draft.parents[row], draft.tokens[row], strict=True):
            paths.append((*paths[parent], int(token)))
        assert [found[path] for path in paths[1:]] == sorted(found.values(), reverse=True)[:NODES]
        from_second += len(set(paths[1:]) - by_path(grown()[0], row).keys())
    assert from_second > 0


@pytest.mark.slow
def test_the_same_model_twice_is_that_model():
    drafts = []
    for make, params in ((tree_drafter, TWO[0]), (merged_tree_drafter, (TWO[0], TWO[0]))):
        own = make(FEW, NODES, depth=DEPTH, beam=BEAM)
        propose = lambda own=own, params=params: own.propose(
            params, own.init(params, PROMPT, SLOTS), TEXT, PROMPT.length, None, None
        )[0]
        drafts.append(jax.jit(propose)())
    jax.tree.map(np.testing.assert_array_equal, *drafts)


def test_merged_trees_need_a_beam_that_meets_their_nodes():
    with pytest.raises(ValueError, match="7 nodes cannot be: 2 levels need as many, and a beam of 2 meets 6"):
        merged_tree_drafter(TARGET, 7, depth=2, beam=2)
