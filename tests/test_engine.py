"""The laws of continuous batching: a row's text is its own, the counts are true, and after warm-up nothing compiles."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import (
    BUDGET,
    EOS,
    NEAR,
    NEARLY,
    PARAMS,
    PROMPTS,
    TARGET,
    answer,
    counted,
    plain_greedy,
    programs,
    simulated,
)

from jaxspec import verify
from jaxspec.adapters import init_bank
from jaxspec.drafters import lm_drafter, silent_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Engine, Method, Routes, unrouted
from jaxspec.requests import MAX_DRAFT, MAX_NODES, Request, room_of
from jaxspec.slots import pool_features
from jaxspec.target import lm_target
from jaxspec.transformer import forward, unembed

K, TASKS, LONGEST = 3, 3, 39
BANK = jax.tree.map(
    lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape),
    init_bank(NEAR, jax.random.key(2), tasks=TASKS, rank=2),
)


def by_features(features: np.ndarray) -> Routes:
    """Some route for each prompt, as a router finds one."""
    found = features.argmax(-1) % (TASKS + 1) - 1
    return Routes(found, np.maximum(found, 0), features.max(-1))


BANKED = Method("banked", by_features, lambda routes: LMDrafterParams(NEAR, BANK))
PLAIN = Method("plain", unrouted, lambda routes: LMDrafterParams(NEAR))


def mixed_engine(slots: int, admit_rows: int, longest: int = 64, budget: int = BUDGET) -> Engine:
    """Serves rows of any settings and any route."""
    shape = {"slots": slots, "admit_rows": admit_rows, "room": room_of(longest, budget)}
    parts = lm_target(TARGET), lm_drafter(TARGET, K), verify.rejection, PARAMS
    return Engine(*parts, stop_tokens=(EOS,), vocab_size=TARGET.vocab_size, **shape)


def mixed_requests(count: int, longest: int, budgets: tuple[int, int]) -> list[Request]:
    """Prompts of many lengths, no two of the same settings."""
    draw = random.Random(count)
    return [
        Request(
            ids=tuple(draw.choices(range(8, TARGET.vocab_size), k=draw.randint(1, longest))),
            max_new_tokens=draw.randint(*budgets),
            number=number,
            seed=draw.randrange(3),
            temperature=draw.choice((0.0, 0.5, 1.0, 1.7)),
            top_k=draw.choice((None, 1, 5, 1 << 40)),
            top_p=draw.choice((None, 0.3, 0.9)),
            draft_limit=draw.choice((0, 1, MAX_DRAFT)),
            route=draw.choice((None, *range(-1, TASKS))),
        )
        for number in range(count)
    ]


def said(completion) -> tuple:
    """All of an answer that must not depend on who was served beside it."""
    counts = [np.ravel(count).tolist() for count in completion.counts]
    return completion.ids, completion.finish_reason, completion.route, completion.task, counts


REQUESTS = mixed_requests(24, LONGEST, (1, BUDGET))
ENGINES = {rows: mixed_engine(4, rows) for rows in (1, 3)}


@pytest.fixture(scope="module")
def alone() -> list[tuple]:
    """What each request is answered when nobody else is served."""
    return [said(ENGINES[1].complete([request], BANKED)[0]) for request in REQUESTS]


@pytest.mark.parametrize("order", ["as asked", "backwards", "shuffled"])
@pytest.mark.parametrize("admit_rows", ENGINES)
def test_an_answer_does_not_depend_on_slot_neighbours_or_order_of_arrival(alone, admit_rows, order):
    arrival = list(range(len(REQUESTS)))
    {"as asked": list, "backwards": list.reverse, "shuffled": random.Random(5).shuffle}[order](arrival)
    answers = ENGINES[admit_rows].complete([REQUESTS[i] for i in arrival], BANKED)
    assert [said(own) for own in answers] == [alone[i] for i in arrival]
    accepted, drafted = (sum(own[4][which][0] for own in alone) for which in (2, 1))
    assert 0.1 < accepted / drafted < 0.9


@pytest.mark.parametrize("admit_rows", ENGINES)
def test_an_answer_does_not_depend_on_how_often_it_is_looked_at(alone, admit_rows):
    parts: dict[int, list[int]] = {i: [] for i in range(len(REQUESTS))}
    ends = {}
    for update in ENGINES[admit_rows].stream(REQUESTS, BANKED, rounds=1):
        parts[update.index] += update.ids
        if update.completion:
            ends[update.index] = said(update.completion)
    assert [ends[i] for i in parts] == alone
    assert [parts[i] for i in parts] == [own[0] for own in alone]


def test_greedy_rows_beside_sampled_ones_equal_plain_decoding(alone):
    greedy = [i for i, request in enumerate(REQUESTS) if request.temperature == 0]
    assert greedy
    for i in greedy:
        assert alone[i][0] == plain_greedy(REQUESTS[i].ids, budget=REQUESTS[i].max_new_tokens)


def test_rows_that_draft_nothing_stand_beside_rows_that_draft():
    asked = [dataclasses.replace(own, draft_limit=MAX_DRAFT * (i % 2)) for i, own in enumerate(REQUESTS)]
    for i, completion in enumerate(ENGINES[3].complete(asked, BANKED)):
        rounds, drafted = completion.counts.num_drafts, completion.counts.num_draft_tokens
        assert (rounds, drafted) == (len(completion.ids), 0) if i % 2 == 0 else drafted == K * rounds


def test_a_request_is_served_by_the_route_it_names_or_by_the_routers():
    for request, completion in zip(REQUESTS, ENGINES[3].complete(REQUESTS, BANKED), strict=True):
        found = by_features(completion.features[None])
        assert completion.route == (found.route[0] if request.route is None else request.route)


@pytest.mark.parametrize("lengths", [(700, 5, 1500), (513, 1024)])
def test_a_prompt_that_is_read_in_pieces_loses_nothing(lengths):
    """Target and drafter are one model, so a token either of them misread shows: as another text or as a rejection."""
    prompts = [tuple(np.random.default_rng(n).integers(8, 40, size=n).tolist()) for n in lengths]
    for ids, completion in zip(prompts, LONG.complete([Request(ids=p, max_new_tokens=8) for p in prompts], TWIN)):
        text = np.zeros((1, 2048), np.int32)
        text[0, : len(ids) + 8] = *ids, *completion.ids
        hidden, best = _read_whole(PARAMS, text)
        assert completion.ids == best[0, len(ids) - 1 : len(ids) + 7].tolist()
        assert (completion.counts.accepted_by_position == completion.counts.drafted_by_position).all()
        expected = pool_features(hidden, np.array([len(ids)]))[0]
        # Unit vectors: rounding in sums of so many terms, each of them at most 1.
        np.testing.assert_allclose(completion.features, expected, atol=len(ids) ** 0.5 * 6e-8 * 32)


LONG = Engine(
    lm_target(TARGET), lm_drafter(TARGET, K), verify.greedy, PARAMS, stop_tokens=(), slots=2, room=room_of(2048, 8),
    vocab_size=TARGET.vocab_size, admit_rows=2,
)  # fmt: skip
TWIN = Method("twin", unrouted, lambda routes: LMDrafterParams(PARAMS))


@jax.jit
def _read_whole(params, text):
    hidden = forward(TARGET, params, text)
    return hidden, jnp.argmax(unembed(TARGET, params, hidden), -1)


COMPILED: list[str] = []


def _note(event: str, seconds: float, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


def test_after_warm_up_nothing_compiles():
    """Not the engine's programs and nothing beside them; JAX itself says so."""
    engine = mixed_engine(32, 8, longest=128, budget=6)
    engine.warm_up(BANKED, (32, 64, 128))
    named = [own.name for own in engine.compiled]
    assert sorted(named) == ["admit"] * 3 + ["chunk", "halt"] + ["prefill"] * 3
    size = [program._cache_size() for program in engine.programs[2:]]
    before = len(COMPILED)
    assert before > 0
    answers = engine.complete(mixed_requests(1000, 128, (2, 6)), BANKED)
    for _ in engine.stream(REQUESTS[:8], BANKED, rounds=2, ended=lambda index, ids: 1):
        pass
    assert len(answers) == 1000 and all(2 <= len(own.ids) <= 6 or own.finish_reason == "stop" for own in answers)
    assert len(COMPILED) == before
    assert [own.name for own in engine.compiled] == named
    assert [program._cache_size() for program in engine.programs[2:]] == size


def test_in_one_slot_a_row_has_a_program_of_its_own_length():
    """The text is the same at every length, rounds are those of that length alone, and all lengths share one warm state."""
    longest = lm_drafter(TARGET, K)
    shorter = {0: silent_drafter(0, longest.init), 1: lm_drafter(TARGET, 1)}
    shape = {"slots": 1, "room": room_of(32, BUDGET), "vocab_size": TARGET.vocab_size, "shorter": shorter}
    engine = Engine(lm_target(TARGET), longest, verify.greedy, PARAMS, stop_tokens=(EOS,), **shape)
    texts = [plain_greedy(ids) for ids in PROMPTS]
    engine.warm_up(PLAIN, (32,))
    assert sorted(own.name for own in engine.compiled) == ["admit", "chunk", "chunk", "chunk", "halt", "prefill"]
    compiled = len(COMPILED)
    for k, least in ((0, 0), (1, 1), (2, K), (3, K)):
        requests = [Request(ids=p, max_new_tokens=BUDGET, num_speculative_tokens=k) for p in PROMPTS]
        for text, own in zip(texts, engine.complete(requests, PLAIN), strict=True):
            assert own.ids == text
            assert own.num_speculative_tokens == least
            assert own.counts.num_draft_tokens == least * own.counts.num_drafts
    said_so = Method(
        "said", lambda features: unrouted(features)._replace(num_speculative_tokens=np.array([1])), PLAIN[2]
    )
    (own,) = engine.complete([Request(ids=PROMPTS[0], max_new_tokens=BUDGET)], said_so)
    assert own.counts.num_draft_tokens == own.counts.num_drafts
    assert len(COMPILED) == compiled


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_left_half_way_does_not_disturb_the_next_call(alone, closed):
    engine = ENGINES[3]
    left = engine.stream(REQUESTS, BANKED, rounds=1)
    for _ in range(7):
        next(left)
    if closed:
        left.close()
    compiled = len(engine.compiled)
    assert [said(own) for own in engine.complete(REQUESTS, BANKED)] == alone
    assert len(engine.compiled) == compiled
    ends = {update.index: said(update.completion) for update in left if update.completion}
    assert all(own == alone[i] for i, own in ends.items()) and bool(ends) != closed


def test_an_endless_source_is_read_only_a_little_ahead():
    numbers = itertools.count()
    source = (Request(ids=PROMPTS[number % 4], max_new_tokens=3, number=number) for number in numbers)
    seen = [update.index for update in itertools.islice(NEARLY.stream(source, PLAIN), 20)]
    assert len(set(seen)) == 20
    assert next(numbers) <= 20 + NEARLY.slots + 4 + 1


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_counts_of_a_row_that_the_host_ends_are_those_of_its_text(rounds):
    """A text cut inside a block, or rounds after its end, which the device could not know of."""
    whole = answer(NEARLY, LMDrafterParams(NEAR))
    keep = [min(n, len(own.ids)) for n, own in zip((5, 1, 8, 14), whole, strict=True)]
    seen = [0] * 4

    def ended(index, ids):
        seen[index] += len(ids)
        return keep[index] - seen[index] + len(ids) if seen[index] >= keep[index] else None

    requests = [Request(ids=ids, max_new_tokens=BUDGET, number=i) for i, ids in enumerate(PROMPTS)]
    updates = list(NEARLY.stream(requests, PLAIN, rounds=rounds, ended=ended))
    done = {update.index: update.completion for update in updates if update.completion}
    for i, ids in enumerate(PROMPTS):
        assert (done[i].ids, done[i].finish_reason) == (whole[i].ids[: keep[i]], "stop")
        assert [token for own in updates if own.index == i for token in own.ids] == done[i].ids
        assert counted(done[i].counts) == simulated(ids, done[i].ids, K)
        assert done[i].counts.num_emitted == keep[i]
    assert all(state.spec.done.all() for state in NEARLY._states.values())  # nobody decodes on for nothing


def test_a_row_is_told_once_to_whoever_may_end_it():
    """Also where rows are looked at only when one of them has ended."""
    told: dict[int, list[int]] = {i: [] for i in range(len(REQUESTS))}
    updates = list(ENGINES[1].stream(REQUESTS, BANKED, ended=lambda index, ids: told[index].extend(ids)))
    assert sorted(update.index for update in updates) == list(told)
    assert all(told[own.index] == own.ids == own.completion.ids for own in updates)


def test_a_request_that_does_not_fit_is_refused_and_the_engine_goes_on():
    engine = NEARLY
    fits = Request(ids=PROMPTS[0], max_new_tokens=engine.room - len(PROMPTS[0]) - MAX_DRAFT - 1)
    with pytest.raises(ValueError, match=f"needs a room of {engine.room + 1} tokens, the slots have {engine.room}"):
        engine.complete([fits, dataclasses.replace(fits, max_new_tokens=fits.max_new_tokens + 1)], PLAIN)
    (completion,) = engine.complete([fits], PLAIN)
    assert completion.ids == plain_greedy(fits.ids, budget=fits.max_new_tokens)


def test_a_drafter_that_drafts_more_than_the_slack_is_refused():
    with pytest.raises(ValueError, match=f"drafts {MAX_NODES + 1} tokens a round"):
        programs(TARGET, MAX_NODES + 1)
