"""Specialists that fail are left out after a few prompts and come back when they no longer do; the text stays the same."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest
from conftest import LINES

from decode import generate
from jaxspec import pooled, reliability, serving
from jaxspec.config import command_line
from jaxspec.reliability import PROBE, Reliability, missed, observed, reliable, served, unknown
from jaxspec.requests import Completion, Request
from jaxspec.router import TRUNK
from jaxspec.store.models import encode
from jaxspec.store.prompts import read_prompts


def test_two_of_eight_that_fail_are_left_out_after_a_few_prompts_and_come_back():
    """The trunk would take 20 rounds for a text; a good specialist takes 14, one that fails 30, with some luck or less."""
    draw, evidence, seen = np.random.default_rng(0), unknown(8), np.zeros(8, int)
    served_by: list[list[int]] = [[] for _ in range(8)]
    for _ in range(800):
        own = int(draw.integers(8))
        (route,) = served(evidence, np.array([own]))
        served_by[own].append(int(route))
        failing = own in (2, 5) and seen[own] < 50
        seen[own] += 1
        rounds = draw.normal(30 if failing else 14, 3)
        evidence = missed(evidence, own) if route == TRUNK else observed(evidence, route, rounds, 20)
    for own, routes in enumerate(served_by):
        first, last = np.array(routes[:50]), np.array(routes[-15:])
        if own in (2, 5):
            assert (first != TRUNK).sum() <= 2 + 50 // PROBE and (first[2:PROBE] == TRUNK).all()
            assert (last != TRUNK).all() or len(routes) < 50 + 8 * PROBE
        else:
            assert (np.array(routes) == own).all()
    assert reliable(evidence)[[0, 1, 3, 4, 6, 7]].all()


def test_what_came_back_serves_again():
    """Old failures fade, however many there were."""
    evidence, probes = unknown(1), 0
    for _ in range(50):
        evidence = observed(evidence, 0, 60, 20)
    while not reliable(evidence)[0] and probes < 25:
        for _ in range(PROBE - 1):
            assert served(evidence, np.array([0, 0])).tolist() == [TRUNK, TRUNK]
            evidence = missed(evidence, 0)
        assert served(evidence, np.array([0])).tolist() == [0]
        evidence, probes = observed(evidence, 0, 14, 20), probes + 1
    assert 1 < probes < 25 and served(evidence, np.array([0])).tolist() == [0]


def test_routes_that_are_no_specialists_are_left_alone():
    evidence = observed(unknown(2), 1, 60, 20)
    assert served(evidence, np.array([0, 1, 2, TRUNK])).tolist() == [0, TRUNK, 2, TRUNK]


class Stream(NamedTuple):
    """The log, task after task, answered where two specialists are noise: with reliability, without, and by the base."""

    done: list[Completion]
    without: list[Completion]
    base: list[Completion]


@pytest.fixture(scope="module")
def stream(corrupted, world) -> Stream:
    engine = pooled.speculative(corrupted, 2, slots=2, room=160)
    lines = read_prompts(str(world.prompts))
    ids = [encode(corrupted.pair.tokenizer, line) for line in lines]
    requests = [Request(ids=own, max_new_tokens=12, number=i) for i, own in enumerate(ids)]
    trust, plain, done = Reliability(corrupted.facts, 2), serving.routed(corrupted, 2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reliability, "EVIDENCE", 4.0)  # texts of the toy world take few rounds
        for at in range(0, len(requests), 2):
            for completion in engine.complete(requests[at : at + 2], trust.over(plain)):
                trust.saw(
                    completion.route, completion.task, completion.counts.num_drafts, completion.counts.num_emitted
                )
                done.append(completion)
        assert trust.left_out() == [0, 1]
    base = engine.complete(requests, serving.always(corrupted, "base", 2))
    return Stream(done, engine.complete(requests, plain), base)


def rounds(completions: list[Completion]) -> int:
    return sum(own.counts.num_drafts for own in completions)


def test_nothing_is_served_by_noise_after_a_few_prompts(stream):
    by_task = [np.array([own.route for own in stream.done if own.task == task]) for task in range(3)]
    for task in (0, 1):
        assert len(by_task[task]) > 8 and (by_task[task][4:PROBE] == TRUNK).all()
    assert (by_task[2] == 2).all()
    assert [own.ids for own in stream.without] == [own.ids for own in stream.done]
    assert rounds(stream.done) < rounds(stream.without)


def test_no_part_of_a_shifting_stream_takes_more_target_calls_than_with_the_base(stream):
    """The prompts that expose the noise, and those that probe it later, included; without reliability every part takes more."""
    assert [own.ids for own in stream.base] == [own.ids for own in stream.done]
    for at in range(0, len(stream.done), LINES):
        of = lambda completions, at=at: rounds(completions[at : at + LINES])
        assert of(stream.done) <= of(stream.base) < of(stream.without)


def test_a_job_goes_on_from_its_records_with_the_specialists_that_it_had_left_out(
    corrupted, pool, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(reliability, "EVIDENCE", 4.0)
    trunk = corrupted.facts["acceptance_length"]["trunk"]
    alone = lambda i: [[9.0 if task == i else 1.0] * len(own) for task, own in enumerate(trunk)]
    promised = corrupted.facts["acceptance_length"] | {name: alone(i) for i, name in enumerate(corrupted.tasks)}
    known = dataclasses.replace(corrupted, facts=corrupted.facts | {"acceptance_length": promised})
    monkeypatch.setattr(generate, "load_pool", lambda *paths, **places: known)
    engine = pooled.speculative(corrupted, 2, "greedy", slots=1, room=160)
    monkeypatch.setattr(pooled, "speculative", lambda *known, **shape: engine)
    lines = [line for file in sorted(world.prompts.iterdir()) for line in file.read_text().splitlines()[:8]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    command = ["--pool", pool, "--input", tmp_path / "in.jsonl", "--output", out, "--batch", 1, "--reliability"]
    command += ["--max-new-tokens", 12, "--num-speculative-tokens", 2]
    answer = lambda: command_line(generate.Generate, generate.run, argv=[str(word) for word in command])
    answer()
    written = out.read_bytes()
    drafters = [own["drafter"] for own in map(json.loads, written.splitlines())]
    served_by = [(own["task"], own["drafter"]) for own in map(json.loads, written.splitlines())]
    for task in ("task 0", "task 1"):
        drafters = [drafter for own, drafter in served_by if own == task]
        assert drafters.count(task) == 1 and drafters[-1] == "trunk"
    for share in (0.15, 0.6):
        out.write_bytes(written[: int(share * len(written))])
        answer()
        assert out.read_bytes() == written
