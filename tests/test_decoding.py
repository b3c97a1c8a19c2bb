"""The laws of the step and its loop on a small transformer, where caches matter.

Verification hides drafting bugs: a broken drafter is slow, never wrong. So a drafter is also run where it must be perfect.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import prompt_of

from jaxspec import metrics, verify
from jaxspec.adapters import Stacked, Whole, init_bank, merge, stack, with_base
from jaxspec.drafters import cached_drafter, lm, lm_drafter, silent_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Engine, Method, unrouted
from jaxspec.recording import NOTHING
from jaxspec.requests import Request, room_of
from jaxspec.speculate import run, speculator
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, forward, init, lay_out, unembed
from jaxspec.types import Draft, Drafter, Sampling, SpecParams

TARGET = LMConfig(
    vocab_size=40,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=64,
    max_positions=256,
    tied=False,  # a random tied model repeats its last token for ever
)
SMALL = dataclasses.replace(TARGET, width=16, num_layers=1, head_dim=4, mlp_width=32)
PARAMS = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(TARGET, jax.random.key(0)))
DRAFT = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, init(SMALL, jax.random.key(1)))
# The target with noise of a tenth of its weights' spread: right about every second token, where DRAFT hardly ever is.
NEAR = jax.tree.map(
    lambda x: x + 0.1 * x.std() * jax.random.normal(jax.random.key(x.size), x.shape) if x.ndim > 1 else x, PARAMS
)
EOS = 7
BUDGET = 24
PROMPTS = [tuple(np.random.default_rng(i).integers(8, 40, size=n).tolist()) for i, n in enumerate((3, 9, 1, 14))]


def engine(drafter, rule=verify.greedy, stops=(EOS,), target=PARAMS, dtype=jnp.float32, **settings):
    shape = {"slots": 4, "room": room_of(32, BUDGET), "vocab_size": TARGET.vocab_size} | settings
    return Engine(lm_target(TARGET, dtype), drafter, rule, target, stop_tokens=stops, **shape)


def programs(config: LMConfig, k: int, rule=verify.greedy, stops=(EOS,), recorder=NOTHING):
    return engine(lm_drafter(config, k), rule, stops, recorder=recorder)


def answer(engine, params, prompts=PROMPTS, route=-1, **settings):
    requests = [Request(ids=ids, max_new_tokens=BUDGET, number=i) for i, ids in enumerate(prompts)]
    routes = np.resize(np.asarray(route), len(prompts)).tolist()
    requests = [dataclasses.replace(r, route=own, **settings) for r, own in zip(requests, routes, strict=True)]
    return engine.complete(requests, Method("given", unrouted, lambda routes: params))


SPEC = {k: programs(SMALL, k) for k in (1, 3)}
SAMPLED = programs(SMALL, 3, verify.rejection)
NEARLY = programs(TARGET, 3)


def plain_greedy(ids, budget=BUDGET, stop=EOS, params=PARAMS):
    """A token at a time, the whole text each time, padded to one length so that it compiles once."""
    out = []
    while len(out) < budget and (not out or out[-1] != stop):
        text = np.zeros((1, 64), np.int32)
        text[0, : len(ids) + len(out)] = [*ids, *out]
        out.append(int(_next(params, text)[len(ids) + len(out) - 1]))
    return out


@jax.jit
def _next(params, text):
    return jnp.argmax(unembed(TARGET, params, forward(TARGET, params, text)), -1)[0]


@pytest.mark.parametrize(("program", "params"), [(SPEC[1], DRAFT), (SPEC[3], DRAFT), (NEARLY, NEAR)])
def test_greedy_equals_plain_decoding(program, params):
    for completion, ids in zip(answer(program, LMDrafterParams(params)), PROMPTS, strict=True):
        assert completion.ids == plain_greedy(ids)


@pytest.mark.parametrize("rule, temperature", [("greedy", 0.0), ("rejection", 1.0), ("gumbel", 1.0)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_drafter_that_is_the_target_loses_nothing(k, rule, temperature):
    """Kept with certainty at temperature 0 and, as q is p, at temperature 1 but for rounding between two programs."""
    program = programs(TARGET, k, getattr(verify, rule), stops=())
    counts = metrics.total(c.counts for c in answer(program, LMDrafterParams(PARAMS), temperature=temperature))
    assert counts.drafted_by_position.sum() > 0
    assert (counts.accepted_by_position == counts.drafted_by_position).all()
    assert counts.num_drafts == 4 * -(-BUDGET // (k + 1))


def test_a_drafter_that_reads_two_columns_a_call_drafts_what_it_drafts_with_one(monkeypatch):
    """As accelerators do with one row; also at a text of one token, which has none before it."""
    found = []
    for columns in (1, 2):
        monkeypatch.setattr(lm, "least_columns", lambda rows, columns=columns: columns)
        nearly = answer(engine(lm_drafter(TARGET, 3), slots=1), LMDrafterParams(NEAR))
        perfect = metrics.total(
            c.counts for c in answer(engine(lm_drafter(TARGET, 3), slots=1), LMDrafterParams(PARAMS))
        )
        assert perfect.num_accepted_tokens == perfect.num_draft_tokens > 0
        found.append([(own.ids, own.counts.num_accepted_tokens, own.counts.num_draft_tokens) for own in nearly])
    assert found[0] == found[1] and any(0 < accepted < drafted for _, accepted, drafted in found[0])


def known_tree(parents: tuple[int, ...], right: tuple[bool, ...]) -> Drafter:
    """Drafts a tree of which some nodes go on with the row's known text; parameters are texts `[n, L]`, a row's by route."""
    depth = [0]
    for parent in parents:
        depth.append(depth[parent] + 1)

    def propose(texts, known, tokens, length, noise, sampling):
        following = jnp.take_along_axis(known, length[:, None] + jnp.array(depth[1:]) - 1, axis=1)
        drafted = jnp.where(jnp.array(right), following, (following + 1) % TARGET.vocab_size)
        batch, nodes = length.shape[0], len(parents)
        tree = jnp.broadcast_to(jnp.array(parents, jnp.int32), (batch, nodes))
        return Draft(drafted.astype(jnp.int32), jnp.full(batch, nodes, jnp.int32), None, tree), known

    keep = lambda params, state, verdict, scores: state
    return Drafter(len(parents), lambda texts, prompt, slots: texts[prompt.route], propose, keep)


def test_a_tree_that_holds_the_answer_loses_nothing():
    """Its path skips window rows, and a wrong node has a child that would be right elsewhere."""
    parents, right = (0, 0, 1, 1, 3, 3, 2), (True, False, True, False, False, True, True)
    texts = np.zeros((4, 64), np.int32)
    for row, ids in zip(texts, PROMPTS, strict=True):
        row[: len(ids) + BUDGET] = [*ids, *plain_greedy(ids, stop=None)]
    own = engine(known_tree(parents, right), stops=())
    for completion, ids in zip(answer(own, jnp.asarray(texts), route=[0, 1, 2, 3]), PROMPTS, strict=True):
        assert completion.ids == plain_greedy(ids, stop=None)
        assert completion.counts.num_drafts == BUDGET // 4  # three nodes of depth 1, 2, 3 and the token behind them


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_see_its_batch(temperature):
    program = SPEC[3] if temperature == 0 else SAMPLED
    together = answer(program, LMDrafterParams(DRAFT), temperature=temperature)
    for i in (0, 3):
        swapped = [PROMPTS[2] if j != i else PROMPTS[i] for j in range(4)]
        again = answer(program, LMDrafterParams(DRAFT), swapped, temperature=temperature)
        assert again[i].ids == together[i].ids


def test_a_seed_names_its_text():
    first, again, other = (answer(SAMPLED, LMDrafterParams(DRAFT), temperature=1.0, seed=s) for s in (3, 3, 4))
    assert [c.ids for c in first] == [c.ids for c in again] != [c.ids for c in other]


@pytest.mark.parametrize("k", SPEC)
def test_drafting_nothing_is_the_same_program_and_the_same_text(k):
    drafted, silent = (answer(SPEC[k], LMDrafterParams(DRAFT), draft_limit=limit) for limit in (16, 0))
    assert [c.ids for c in drafted] == [c.ids for c in silent]
    assert all(c.counts.num_draft_tokens == 0 and c.counts.num_drafts == len(c.ids) for c in silent)
    assert SPEC[k].programs.chunk._cache_size() == 1


@pytest.mark.parametrize("way", ["gathered", "side by side", "whole"])
def test_rows_with_different_adapters_share_a_program_and_equal_merged_weights(way):
    bank = init_bank(DRAFT, jax.random.key(2), tasks=3, rank=2)
    bank = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(3), x.shape), bank)
    whole = Whole(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(merge(DRAFT, bank, task) for task in range(3))))
    routes = [2, -1, 0, 1]
    ways = {"gathered": (DRAFT, bank), "side by side": (stack(DRAFT, bank), Stacked())}
    ways |= {"whole": (DRAFT, with_base(DRAFT, whole))}
    mixed = answer(SPEC[3], LMDrafterParams(*ways[way]), route=routes)
    for i, route in enumerate(routes):
        alone = answer(SPEC[3], LMDrafterParams(merge(DRAFT, bank, route)))
        assert mixed[i].ids == alone[i].ids
        np.testing.assert_array_equal(mixed[i].counts.accepted_by_position, alone[i].counts.accepted_by_position)


def test_rows_whose_own_weights_are_the_targets_lose_nothing():
    other = jax.tree.map(lambda x: x[::-1], PARAMS)
    bank = with_base(NEAR, Whole(jax.tree.map(lambda *leaves: jnp.stack(leaves), other, PARAMS)))
    found = answer(programs(TARGET, 4), LMDrafterParams(NEAR, bank), route=[1, 0, -1, 1])
    accepted = [c.counts.num_accepted_tokens / c.counts.num_draft_tokens for c in found]
    assert accepted[0] == accepted[3] == 1 > accepted[2] > accepted[1]


def test_a_stop_inside_a_block_ends_the_row():
    """With the target as drafter whole blocks are accepted, so a stop falls inside one; nothing after it leaks."""
    program = programs(TARGET, 4)
    free = answer(programs(TARGET, 4, stops=()), LMDrafterParams(PARAMS))
    for completion, open_end in zip(answer(program, LMDrafterParams(PARAMS)), free, strict=True):
        ends = EOS in open_end.ids
        cut = open_end.ids[: open_end.ids.index(EOS) + 1] if ends else open_end.ids
        assert completion.ids == cut
        assert completion.finish_reason == ("stop" if ends else "length")
        assert completion.counts.num_emitted == len(cut)


def test_a_stop_beats_the_budget_and_a_budget_is_kept():
    text = plain_greedy(PROMPTS[1], stop=-1)
    at, stop = next((i, token) for i, token in enumerate(text) if i >= 3 and token not in text[:i])
    program = programs(TARGET, 4, stops=(stop, 39))
    for budget, reason in ((at + 1, "stop"), (at + 3, "stop"), (at, "length")):
        completion = answer(program, LMDrafterParams(PARAMS), [PROMPTS[1]], max_new_tokens=budget)[0]
        assert (completion.ids, completion.finish_reason) == (text[: min(at + 1, budget)], reason)


def test_nothing_behind_a_stop_leaks():
    """Not to the buffer, the counts or the lengths of the caches; a finished row stays as it is. Whole blocks are kept."""
    limits = (24, 24, 5, 11)
    text = [plain_greedy(ids, limit, stop=-1) for ids, limit in zip(PROMPTS, limits, strict=True)]
    stops = text[0][6], text[1][2], text[3][7]
    cut = np.array([next((i + 1 for i, token in enumerate(out) if token in stops), len(out)) for out in text])
    lengths = jnp.array([len(ids) for ids in PROMPTS])
    padded = np.array([np.pad(ids, (0, 14 - len(ids))) for ids in PROMPTS])
    prompt = prompt_of(padded, limit=1)._replace(length=lengths, limit=jnp.array(limits))
    spec = speculator(lm_target(TARGET), lm_drafter(TARGET, 4), verify.greedy, stop_tokens=stops)
    params = SpecParams(PARAMS, LMDrafterParams(PARAMS))

    @jax.jit
    def decode():
        start = spec.init(params, prompt, lm_target(TARGET).init(PARAMS, prompt, 64)[0], None, 64)
        return run(spec.step, metrics.remember, params, start, metrics.no_history(4, 64))

    state, history = decode()
    for row, ids, out, size in zip(np.asarray(state.tokens), PROMPTS, text, cut, strict=True):
        assert row.tolist() == [*ids, *out[:size], *[0] * (64 - len(ids) - size)]
    np.testing.assert_array_equal(state.stopped, [out[size - 1] in stops for out, size in zip(text, cut)])
    np.testing.assert_array_equal(state.length, lengths + cut)
    np.testing.assert_array_equal(state.drafter.length, state.length)
    np.testing.assert_array_equal(state.target.length, state.length - 1)
    assert history.rounds.tolist() == [-(-size // 5) for size in cut]
    later, info = jax.jit(spec.step)(params, state)
    assert not info.verdict.num_emitted.any() and not info.num_drafted.any() and not info.num_accepted.any()
    for kept, before in zip(later[:6], state[:6], strict=True):
        assert (kept == before).all()
    np.testing.assert_array_equal(later.target.length, state.target.length)
    np.testing.assert_array_equal(later.drafter.length, state.drafter.length)


def simulated(ids, out, k):
    """NEAR's rounds, drafted and accepted tokens by teacher-forced agreement along an output, places past its end left out."""
    text = np.zeros((1, 64), np.int32)
    text[0, : len(ids) + len(out)] = [*ids, *out]
    guess = np.asarray(_next(NEAR, text))[len(ids) - 1 : len(ids) + len(out) - 1]
    rounds = drafted = accepted = at = 0
    while at < len(out):
        block = guess[at : at + k] == np.array(out[at : at + k])
        rounds += 1
        drafted += len(block)
        accepted += int(np.cumprod(block).sum())
        at += int(np.cumprod(block).sum()) + 1
    return rounds, drafted, accepted


def counted(counts):
    return counts.num_drafts, counts.drafted_by_position.sum(), counts.accepted_by_position.sum()


def test_counts_equal_a_simulation_along_the_output():
    """Accepted over drafted as the reference counts it."""
    completions = answer(NEARLY, LMDrafterParams(NEAR))
    for completion, ids in zip(completions, PROMPTS, strict=True):
        assert counted(completion.counts) == simulated(ids, completion.ids, 3)
    accepted, drafted = np.sum([counted(own.counts) for own in completions], 0)[[2, 1]]
    assert 0.1 < accepted / drafted < 0.9


def test_autoregressive_text_does_not_depend_on_the_width():
    one, four = (engine(silent_drafter(w - 1)) for w in (1, 4))
    assert [c.ids for c in answer(one, ())] == [c.ids for c in answer(four, ())]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "drafter", [lm_drafter(SMALL, 2), cached_drafter(SMALL, 2, layers=3, width=2)], ids=["lm", "cached"]
)
def test_a_step_preserves_the_type_of_its_state(drafter, sampled):
    spec = speculator(lm_target(TARGET), drafter, verify.rejection, stop_tokens=(EOS,))
    params = SpecParams(PARAMS, LMDrafterParams(DRAFT))
    sampling = Sampling(jnp.ones(2)) if sampled else None

    def start():
        prompt = prompt_of([[1, 2, 3], [4, 5, 6]], limit=5)
        slots = room_of(3, 5)
        state, _ = lm_target(TARGET).init(PARAMS, prompt, slots)
        return spec.init(params, prompt, state, sampling, slots)

    before = jax.eval_shape(start)
    after = jax.eval_shape(lambda: spec.step(params, start())[0])
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.shape[0] == 2


@pytest.mark.parametrize("place", [lambda params: params, lay_out], ids=["plain", "laid out"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_greedy_is_bit_equal_through_its_own_program(dtype, place):
    low = lambda tree: place(jax.tree.map(lambda x: x.astype(dtype), tree))
    own = engine(lm_drafter(TARGET, 3, dtype=dtype), target=low(PARAMS), dtype=dtype)
    run = lambda limit: answer(own, LMDrafterParams(low(NEAR)), draft_limit=limit)
    drafted = run(16)
    assert metrics.total(c.counts for c in drafted).num_accepted_tokens > 20
    assert [c.ids for c in drafted] == [c.ids for c in run(0)]
