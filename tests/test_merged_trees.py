"""Merged trees: two models' trees under one root, what both have met once, and the likeliest of them on average.

The laws that they share with trees are in `test_tree.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import NEAR, PARAMS, PROMPTS, TARGET, answer, plain_greedy
from test_tree import BEAM, DEPTH, FEW, FEW_OTHER, FEW_PARAMS, NODES, SLOTS, drafted, program
from toys import prompt_of

from jaxspec import pooled, router, serving
from jaxspec.adapters import Whole, init_bank, merge, with_base
from jaxspec.drafters import merged_tree_drafter, tree_drafter
from jaxspec.drafters.beam import met, search
from jaxspec.drafters.lm import LMDrafterParams, begin, model
from jaxspec.drafters.merged_trees import TwoDrafters, levels, united
from jaxspec.drafters.tree import candidates
from jaxspec.requests import Request, room_of
from jaxspec.router import TRUNK

PROMPT = prompt_of(np.random.default_rng(1).integers(FEW.vocab_size, size=(6, 5)), limit=1)
TEXT = jnp.pad(PROMPT.tokens, ((0, 0), (0, SLOTS - 5)))
TWO = TwoDrafters(LMDrafterParams(FEW_PARAMS), LMDrafterParams(FEW_OTHER))


def test_a_second_drafter_that_is_the_target_loses_nothing():
    """Sure of itself beside one that finds everything equally likely, so that its chain is among what is verified."""
    sure = PARAMS | {"head": {"kernel": 1000 * PARAMS["head"]["kernel"]}}
    both = TwoDrafters(LMDrafterParams(jax.tree.map(jnp.zeros_like, PARAMS)), LMDrafterParams(sure))
    for own, ids in zip(answer(program("merged trees"), both), PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        assert own.counts.num_drafts == -(-len(own.ids) // (DEPTH + 1))


def test_in_whichever_place_of_a_rows_pair_the_target_is_nothing_is_lost():
    sure = PARAMS | {"head": {"kernel": 1000 * PARAMS["head"]["kernel"]}}
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    bank = with_base(nothing, Whole(jax.tree.map(lambda *leaves: jnp.stack(leaves), nothing, sure)))
    own = LMDrafterParams(nothing, bank)
    pairs = jnp.array([[0, 1], [1, -1], [1, 0], [0, 0]])
    *found, lost = answer(
        program("merged trees"), TwoDrafters(own, own, pairs), [*PROMPTS, PROMPTS[0]], [0, 1, 2, 0, -1]
    )
    for own, ids in zip(found, PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        assert own.counts.num_drafts == -(-len(own.ids) // (DEPTH + 1))
    assert lost.ids == plain_greedy(PROMPTS[0]) and lost.counts.num_drafts > found[0].counts.num_drafts


@pytest.mark.slow
def test_rows_of_different_pairs_draft_as_each_pair_alone():
    """And a drafter that is beside itself as its own tree."""
    bank = init_bank(NEAR, jax.random.key(2), tasks=3, rank=2)
    bank = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), bank)
    every, pairs = LMDrafterParams(NEAR, bank), [(0, 1), (1, 0), (2, 2), (2, -1)]
    together = answer(program("merged trees"), TwoDrafters(every, every, jnp.array(pairs)), route=[0, 1, 2, 3])
    of = lambda route: LMDrafterParams(merge(NEAR, bank, route))
    for i, (first, second) in enumerate(pairs):
        alone = answer(program("merged trees"), TwoDrafters(of(first), of(second)))
        assert drafted(alone[i : i + 1]) == drafted(together[i : i + 1])
    assert drafted(answer(program("tree"), of(2))[2:3]) == drafted(together[2:3])
    assert len({str(drafted(answer(program("tree"), of(route)))) for route in range(3)}) == 3


@pytest.fixture
def three_tasks(loaded):
    """A pool that is sure of nobody, whose last task the trunk serves, and features of prompts that belong anywhere."""
    lengths = {name: [[2.0] * len(own) for own in loaded.facts["acceptance_length"][name]] for name in loaded.names}
    lengths |= {name: [[3.0] * len(own) for own in lengths[name]] for name in loaded.tasks[:2]}
    facts = {**loaded.facts, "fallback_below": 0.45, "acceptance_length": loaded.facts["acceptance_length"] | lengths}
    mean, deviation = np.asarray(loaded.router.mean), np.asarray(loaded.router.deviation)
    features = mean + deviation * np.random.default_rng(0).normal(size=(200, len(mean)))
    return dataclasses.replace(loaded, facts=facts), features.astype(np.float32)


def test_the_pair_is_the_routers_first_and_second_choice(three_tasks):
    """Of drafters: where the trunk serves a task, or an unsure prompt, the likeliest specialist is beside it."""
    pool, features = three_tasks
    said = np.asarray(router.probabilities(pool.router, features))
    assert pool.drafters == [0, 1, TRUNK]
    found = serving.pairs(pool)[serving.two_best(pool, 3).route(features).route].tolist()
    for pair, probability in zip(found, said, strict=True):
        wanted = [pool.drafters[task] for task in np.argsort(-probability)]
        wanted = [TRUNK, *wanted] if probability.max() < 0.45 else wanted
        assert pair == list(dict.fromkeys(wanted))[:2]
    assert len(set(map(tuple, found))) == 6
    assert router.runner_up(said, np.full(3, TRUNK), np.full(200, TRUNK)).tolist() == [TRUNK] * 200


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_pools_two_best_leave_the_text_as_it_is(loaded, slots):
    shape = {"slots": slots, "room": room_of(32, 12)}
    requests = [Request(ids=(40 + i, 60 + i, 9), max_new_tokens=12, number=i) for i in range(5)]
    found = pooled.uniting(loaded, 6, depth=2, beam=2, **shape).complete(requests, serving.two_best(loaded, slots))
    plain = pooled.autoregressive(loaded, 1, **shape).complete(
        requests, serving.always(loaded, "autoregressive", slots)
    )
    assert [own.ids for own in found] == [own.ids for own in plain]
    assert sum(own.counts.num_accepted_tokens for own in found) > 0
    assert all(serving.pairs(loaded)[own.route, 0] in (own.task, TRUNK) for own in found)


@jax.jit
def grown() -> tuple:
    """Each model's candidates, and both as one."""
    found = []
    for own in TWO[:2]:
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
    for make, params in ((tree_drafter, TWO[0]), (merged_tree_drafter, TwoDrafters(TWO[0], TWO[0]))):
        own = make(FEW, NODES, depth=DEPTH, beam=BEAM)
        propose = lambda own=own, params=params: own.propose(
            params, own.init(params, PROMPT, SLOTS), TEXT, PROMPT.length, None, None
        )[0]
        drafts.append(jax.jit(propose)())
    jax.tree.map(np.testing.assert_array_equal, *drafts)


def test_merged_trees_need_a_beam_that_meets_their_nodes():
    with pytest.raises(ValueError, match="7 nodes cannot be: 2 levels need as many, and a beam of 2 meets 6"):
        merged_tree_drafter(TARGET, 7, depth=2, beam=2)
