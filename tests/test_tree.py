"""Token trees: drafted rightly, which verification would hide, and never worse than the chain of their depth."""

import dataclasses
import itertools
import random
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, DRAFT, NEAR, NEARLY, PARAMS, PROMPTS, SMALL, TARGET, answer, engine, plain_greedy
from test_lossless import LAWS, code, emitted, every_draft, language, likelihoods, texts
from toys import SETTINGS, prompt_of

from jaxspec import verify
from jaxspec.ancestry import ancestry, depths
from jaxspec.drafters import graph_drafter, merged_tree_drafter, tree_drafter
from jaxspec.drafters.beam import search
from jaxspec.drafters.lm import LMDrafterParams, model
from jaxspec.drafters.merged_trees import TwoDrafters
from jaxspec.drafters.tree import candidates, greedy_first, likeliest
from jaxspec.requests import MAX_NODES, room_of, slack
from jaxspec.speculate import speculator
from jaxspec.target import lm_target
from jaxspec.transformer import forward, init, prefill, unembed
from jaxspec.types import SpecParams, Verdict

NODES, DEPTH, BEAM, SLOTS = 8, 3, 2, 64
OWN = LMDrafterParams(NEAR)
DRAFTERS = {
    "tree": tree_drafter,
    "graph": partial(graph_drafter, ancestors=0),
    "merged trees": merged_tree_drafter,
}


@cache
def program(name: str):
    """Serves greedy rows, too."""
    return engine(DRAFTERS[name](TARGET, NODES, depth=DEPTH, beam=BEAM), verify.gumbel)


def near(weights):
    """Weights not far from these."""
    return jax.tree.map(lambda x: x + 0.1 * x.std() * jnp.cos(jnp.arange(x.size)).reshape(x.shape), weights)


def params(name: str, weights, other=None):
    """Of a drafter, or of two of which the first has the weights."""
    one = LMDrafterParams(weights)
    second = LMDrafterParams(OTHER if other is None else other)
    return TwoDrafters(one, second) if name == "merged trees" else one


OTHER = near(PARAMS)
FEW = dataclasses.replace(TARGET, vocab_size=6)  # whose texts repeat
FEW_PARAMS = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(FEW, jax.random.key(0)))
FEW_OTHER = near(FEW_PARAMS)


def drafted(found):
    """Rounds, and tokens drafted and accepted by place, of every row."""
    return [(own.counts.num_drafts, own.counts.accepted_by_position[:DEPTH].tolist()) for own in found]


def way_up(parents, row: int) -> set[int]:
    """A window row and those above it."""
    return {row} | (way_up(parents, parents[row - 1]) if row else set())


def test_lineage_is_the_way_up():
    draw = random.Random(0)
    trees = [[draw.randint(0, node) for node in range(9)] for _ in range(20)] + [list(range(9)), [0] * 9]
    seen = ancestry(jnp.array(trees))
    for parents, own, depth in zip(trees, np.asarray(seen), np.asarray(depths(seen)), strict=True):
        expected = [way_up(parents, row) for row in range(10)]
        assert [set(np.flatnonzero(row)) for row in own] == expected
        assert depth.tolist() == [len(rows) - 1 for rows in expected]


@pytest.fixture(scope="module")
def rounds():
    """Three rounds of trees."""
    return rounds_of(tree_drafter(TARGET, NODES, depth=DEPTH, beam=BEAM), OWN, 3)


def rounds_of(own, own_params, number: int):
    """States of four rows, before and after each of so many rounds, and what was proposed in each; by one program."""
    padded = np.array([np.pad(ids, (0, 14 - len(ids))) for ids in PROMPTS])
    prompt = prompt_of(padded, limit=BUDGET)._replace(length=jnp.array([len(ids) for ids in PROMPTS]))
    spec = speculator(lm_target(TARGET), own, verify.greedy, stop_tokens=())
    params = SpecParams(PARAMS, own_params)
    begin = lambda: spec.init(params, prompt, lm_target(TARGET).init(PARAMS, prompt, SLOTS)[0], None, SLOTS)
    states, infos, step = [jax.jit(begin)()], [], jax.jit(spec.step)
    for _ in range(number):
        state, info = step(params, states[-1])
        states.append(state)
        infos.append(info)
    assert step._cache_size() == 1
    return states, infos


@jax.jit
def met_after(state):
    """All candidates of the beam that looks on from a state."""
    read, say = model(TARGET, OWN, None)
    met = search(read, say, state.drafter.model.cache, state.tokens, state.length, depth=DEPTH, beam=BEAM)[0]
    return candidates(met._replace(score=greedy_first(met.score)))


@jax.jit
def log_q(texts):
    """What NEAR says of each token of texts `[n, T]`, read from scratch."""
    own = jax.nn.log_softmax(unembed(TARGET, NEAR, forward(TARGET, NEAR, texts)), -1)
    return jnp.take_along_axis(own[:, :-1], texts[:, 1:, None], axis=-1)[..., 0]


def texts_of(state, tokens, parents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every node's text `[B * C, SLOTS]` from the prompt on, how much of it is the row's, and its whole length."""
    rows, begun, whole = [], [], []
    for row, (text, length) in enumerate(zip(np.asarray(state.tokens), np.asarray(state.length), strict=True)):
        for node in range(1, tokens.shape[1]):
            way, at = [], node
            while at:
                way, at = [int(tokens[row, at]), *way], int(parents[row, at])
            rows.append(np.pad([*text[:length], *way], (0, SLOTS - length - len(way))))
            begun.append(int(length))
            whole.append(int(length) + len(way))
    return np.array(rows), np.array(begun), np.array(whole)


def test_every_candidate_has_the_score_of_its_text_read_from_scratch(rounds):
    """After rounds that moved the cache, so that each sees its own ancestors, at their positions, and nobody else."""
    greedy = [0, 1, 1 + BEAM, 1 + BEAM + BEAM**2]
    for state in rounds[0][::3]:
        found = jax.tree.map(np.asarray, met_after(state))
        texts, begun, whole = texts_of(state, found.tokens, found.parent)
        said, place = np.asarray(log_q(texts)), np.arange(1, SLOTS)
        scores = np.where((place >= begun[:, None]) & (place < whole[:, None]), said, 0.0).sum(1).reshape(4, -1)
        assert (found.parent[:, greedy[1:]] == greedy[:-1]).all() and (found.score[:, greedy[1:]] == 0).all()
        others = np.setdiff1d(np.arange(1, found.tokens.shape[1]), greedy)
        np.testing.assert_allclose(found.score[:, others], scores[:, others - 1], atol=1e-4)


def test_caches_hold_what_the_text_read_from_scratch_leaves(rounds):
    """Of the accepted path, target's and drafter's alike; the drafter's lacks its last token but one."""
    read = jax.jit(lambda params, state: prefill(TARGET, params, state.tokens, state.length, SLOTS, jnp.float32)[1])
    state, accepted = rounds[0][-1], sum(info.num_accepted for info in rounds[1])
    assert (accepted > 0).all()
    for params, own, less in ((PARAMS, state.target, 1), (NEAR, state.drafter.model, 2)):
        fresh, length = read(params, state), np.asarray(state.length) - less
        for ours, theirs in zip(jax.tree.leaves(own.cache), jax.tree.leaves(fresh), strict=True):
            for row, number in enumerate(length):
                np.testing.assert_allclose(ours[row, :, :number], theirs[row, :, :number], atol=1e-4)


def test_a_step_preserves_the_type_of_its_state(rounds):
    before, after = rounds[0][0], rounds[0][-1]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or 1 / 0, before, after)


def test_the_tree_is_the_best_of_what_the_beam_met(rounds):
    """Parents stand before children, the children of a node are unlike, and fewer nodes are the first of more."""
    found = met_after(rounds[0][1])
    (more, slot), (fewer, first) = likeliest(found, NODES), likeliest(found, NODES - 3)
    np.testing.assert_array_equal(fewer.tokens, more.tokens[:, :-3])
    np.testing.assert_array_equal(fewer.parents, more.parents[:, :-3])
    np.testing.assert_array_equal(first, slot[:, :-3])
    assert (np.asarray(more.parents) <= np.arange(NODES)).all()
    for row in range(4):
        link = lambda parents, tokens, row=row: list(
            zip(np.asarray(parents)[row], np.asarray(tokens)[row], strict=True)
        )
        assert len(set(link(more.parents, more.tokens))) == NODES
        place = {own: at for at, own in enumerate(link(found.parent, found.tokens)) if at}
        rows, chosen = [0], []
        for parent, token in link(more.parents, more.tokens):
            chosen.append(place[rows[parent], token])
            rows.append(chosen[-1])
        rest = np.setdiff1d(np.arange(1, found.score.shape[1]), chosen)
        assert found.score[row, np.array(chosen)].min() >= found.score[row, rest].max()


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_that_is_the_target_loses_nothing(name):
    """Kept to its last level in every round, also in a row of one token, whose opening reads before its beginning."""
    for own, ids in zip(answer(program(name), params(name, PARAMS)), PROMPTS, strict=True):
        counts = own.counts
        assert own.ids == plain_greedy(ids)
        assert counts.num_drafts == -(-len(own.ids) // (DEPTH + 1))
        assert (counts.accepted_by_position == counts.drafted_by_position)[:DEPTH].all()


def onward(name: str, rows_of, number: int):
    """Drafts so many times behind texts of few tokens, of which each goes on along the window rows `rows_of(state, draft)`.

    Yields the state that proposed, the draft, and the one of a drafter that begins with the text.
    """
    own, weights = DRAFTERS[name](FEW, 30, depth=DEPTH, beam=4), params(name, FEW_PARAMS, FEW_OTHER)
    tokens, length = np.zeros((4, SLOTS), np.int32), np.full(4, 3)
    tokens[:, :3] = np.random.default_rng(0).integers(FEW.vocab_size, size=(4, 3))
    begin = jax.jit(lambda prompt: own.init(weights, prompt, SLOTS))
    propose = jax.jit(lambda state, *text: own.propose(weights, state, *text, None, None))
    prompt = lambda: prompt_of(tokens, limit=1)._replace(length=jnp.asarray(length))
    state = begin(prompt())
    for _ in range(number):
        (draft, state), (fresh, _) = propose(state, tokens, length), propose(begin(prompt()), tokens, length)
        yield state, draft, fresh
        path, emitted = np.zeros((4, 31), np.int32), np.zeros(4, np.int32)
        for row, end in enumerate(rows_of(state, draft)):
            way = sorted(way_up(np.asarray(draft.parents)[row].tolist(), end))
            path[row, : len(way)], emitted[row] = way, len(way)
            said = [*np.asarray(draft.tokens)[row, np.array(way[1:], int) - 1], 0]
            tokens[row, length[row] : length[row] + len(way)] = said
        length = length + emitted
        verdict = Verdict(
            jnp.zeros((4, 31), jnp.int32), jnp.asarray(emitted), jnp.asarray(emitted) - 1, jnp.asarray(path)
        )
        state = own.commit(weights, state, verdict, None)


def anywhere(draw: random.Random):
    """Every text goes on along some window row of its own."""
    return lambda state, draft: [draw.randrange(31) for _ in range(4)]


@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_drafted_depends_on_the_text_alone(name):
    """Whatever was accepted, a drafter goes on as one that begins with the text: its caches hold that and nothing else."""
    for _, draft, fresh in onward(name, anywhere(random.Random(0)), 6):
        jax.tree.map(np.testing.assert_array_equal, draft, fresh)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_trees_that_are_drafted_leave_the_targets_law(name, setting):
    p = language(3, 3, setting)
    expected = likelihoods(p, texts(3, 5)).prod(1)
    for (parents, tokens), law in itertools.product(small_trees(name), LAWS.values()):
        found = emitted(law, every_draft(3, 4, parents, 4), p, parents, 4)[code(np.array(tokens), 3)]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@cache
def small_trees(name: str) -> set[tuple]:
    """Parents and tokens of what is drafted of three tokens."""
    three = dataclasses.replace(FEW, vocab_size=3)
    one, other = (jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(three, jax.random.key(i))) for i in (0, 1))
    own, weights = DRAFTERS[name](three, 4, depth=2, beam=2), params(name, one, other)
    prompt = prompt_of(np.array(list(np.ndindex(3, 3, 3)))[::3], limit=1)
    text = jnp.pad(prompt.tokens, ((0, 0), (0, 29)))
    propose = lambda: own.propose(weights, own.init(weights, prompt, 32), text, prompt.length, None, None)[0]
    draft = jax.tree.map(np.asarray, jax.jit(propose)())
    return {tuple(tuple(row.tolist()) for row in both) for both in zip(draft.parents, draft.tokens, strict=True)}


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_equals_plain_decoding_and_no_row_needs_more_rounds_than_with_the_chain(name):
    before = program(name).programs.chunk._cache_size()  # other tests give it parameters of other shapes
    trees, chains = answer(program(name), params(name, NEAR)), answer(NEARLY, OWN)
    for own, ids in zip(trees, PROMPTS, strict=True):
        assert own.ids == plain_greedy(ids)
        assert own.counts.num_verified_nodes == NODES * own.counts.num_drafts
        assert own.counts.num_drafter_calls == DEPTH * (1 + (name == "merged trees")) * own.counts.num_drafts
    fewer = [b.counts.num_drafts - a.counts.num_drafts for a, b in zip(trees, chains, strict=True)]
    assert min(fewer) >= 0 and sum(fewer) > 0
    limited = lambda limit: answer(program(name), params(name, NEAR), draft_limit=limit)
    assert drafted(limited(DEPTH)) == drafted(chains)  # what is left of a tree is the chain
    assert [own.ids for own in limited(0)] == [own.ids for own in trees]
    assert program(name).programs.chunk._cache_size() in (before, before + 1)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_row_does_not_see_its_batch(name):
    with_prompts = lambda prompts: answer(program(name), params(name, NEAR), prompts)
    together = with_prompts(PROMPTS)
    for i in (0, 3):
        again = with_prompts([PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)])
        assert (again[i].ids, drafted(again)[i]) == (together[i].ids, drafted(together)[i])


@pytest.mark.parametrize("name", DRAFTERS)
def test_under_gumbel_coupling_text_is_that_of_the_noise_whatever_is_drafted(name):
    sampled = partial(answer, program(name), params(name, NEAR), temperature=0.4)
    found, silent = (sampled(draft_limit=limit) for limit in (NODES, 0))
    assert sum(each.counts.num_accepted_tokens for each in found) > 0
    assert [each.ids for each in found] == [each.ids for each in silent]


def test_a_tree_needs_room_and_a_beam_that_meets_its_nodes():
    for nodes in (1, 7):
        with pytest.raises(
            ValueError, match=f"{nodes} nodes cannot be: 2 levels need as many, and a beam of 2 meets 6"
        ):
            tree_drafter(SMALL, nodes, depth=2, beam=2)
    wide = tree_drafter(SMALL, MAX_NODES, depth=2)
    assert slack() == 17 and slack(MAX_NODES) == 65
    tight = engine(wide)
    with pytest.raises(ValueError, match=f"the slots have {tight.room}"):
        answer(tight, LMDrafterParams(DRAFT))
    assert engine(wide, room=room_of(32, BUDGET, MAX_NODES)).slack == 65
    with pytest.raises(ValueError, match=f"drafts {MAX_NODES + 1} tokens a round"):
        engine(tree_drafter(SMALL, MAX_NODES + 1, depth=3))
