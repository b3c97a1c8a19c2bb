"""What is learnt from text to text: prompts begin with the right drafter after a few, and what comes out stays the same."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import BUDGET, TARGET, engine
from test_hedge import HIDDEN, K

from decode import generate
from jaxspec import pooled, shift, verify
from jaxspec.config import command_line
from jaxspec.drafters import hedged
from jaxspec.drafters.hedge import prior, reweighed
from jaxspec.engine import Method, Routes
from jaxspec.experience import BOUND, Experience, learnt, moved
from jaxspec.recording import NOTHING, choices, logprobs, together
from jaxspec.replay import Served
from jaxspec.requests import Request
from jaxspec.router import TRUNK
from jaxspec.store.stages import read_arrays

TASKS, TOKENS = 6, 60


def final(route: int, best: int, drafters: int, draw) -> list[float]:
    """Log weights after a text on which one drafter loses .3 a token and the others .5, judged as rows are."""
    weights = prior(jnp.array([route % drafters]), drafters)
    for _ in range(TOKENS // 10):
        rate = np.where(np.arange(drafters) == best, 0.3, 0.5)
        loss = draw.binomial(10, rate)[None].astype(np.float32)
        weights = reweighed(weights, jnp.asarray(loss), jnp.array([10]), rate=1.0, share=0.01)
    return np.asarray(weights)[0].tolist()


def begun(experience: Experience, right: list[int], prompts: int, draw) -> np.ndarray:
    """`[prompts, T]` which prompts of each task, taken in turn, began with the right drafter; all are learnt from."""
    hits = np.zeros((prompts, len(right)), bool)
    for number in range(prompts):
        for task, best in enumerate(right):
            route = int(experience.routes()[task])
            hits[number, task] = route == best
            experience.saw(task, 1.0, route, final(route, best, TASKS + 2, draw))
    return hits


def test_a_router_that_is_wrong_about_its_tasks_is_put_right_after_a_few_prompts_and_again_after_a_shift():
    """All specialists are permuted; later they are permuted back, when much speaks for what was right before."""
    draw, wrong = np.random.default_rng(0), np.roll(np.arange(TASKS), 1)
    experience = Experience(wrong.tolist(), TASKS + 2, 0.5)
    hits = begun(experience, list(range(TASKS)), 20, draw)
    assert not hits[0].any() and hits[4:].mean() > 0.95
    again = begun(experience, wrong.tolist(), 20, draw)
    assert again[:1].mean() < 0.2 and again[10:].mean() > 0.95


def test_a_task_does_not_learn_from_others_and_prompts_without_one_are_a_task_too():
    draw, experience = np.random.default_rng(0), Experience([0, 1, TRUNK], 5, 0.5)
    for _ in range(5):
        experience.saw(0, 1.0, 0, final(0, 3, 5, draw))
        experience.saw(1, 0.4, TRUNK, final(TRUNK, 2, 5, draw))
        experience.saw(2, 1.0, TRUNK, final(TRUNK, 0, 5, draw))
    assert experience.routes().tolist() == [3, 1, 0, 2]


def test_what_is_known_stays_bounded_and_a_text_that_says_nothing_leaves_the_choice():
    weights = np.zeros(3)
    for _ in range(100):
        weights = learnt(weights, np.array([0.0, 9.0, 3.0]))
    assert weights.tolist() == [-BOUND, 0.0, -BOUND]
    assert learnt(weights, moved(np.asarray(prior(jnp.array([0]), 3)), np.array([0]))[0]).argmax() == 1


def test_where_a_method_has_other_reasons_than_the_task_its_choice_stands():
    method = Method(
        "own", lambda features: Routes(np.array([0, TRUNK]), np.zeros(2, int), np.ones(2)), lambda routes: ()
    )
    experience = Experience([0, 1], 4, 0.5)
    experience.saw(0, 1.0, 0, [-9.0, 0.0, -9.0, -9.0])
    assert experience.over(method).route(np.zeros((2, 4))).route.tolist() == [1, TRUNK]


def of_sign(features: np.ndarray) -> Routes:
    """Two tasks, which begin with one of the two drafters that are wrong."""
    task = (features[:, 0] > np.median(FIRST)).astype(int)
    return Routes(1 - task, task, np.ones(len(task)))


METHOD = Method("online", of_sign, lambda routes: HIDDEN)
REQUESTS = [
    Request(ids=tuple(np.random.default_rng(i).integers(8, 40, size=5).tolist()), max_new_tokens=BUDGET, number=i)
    for i in range(12)
]
ENGINE = engine(hedged(TARGET, K, 3, window=4), verify.greedy, (), recorder=choices(3), slots=1)
FIRST = [0.0]


@pytest.fixture(scope="module", autouse=True)
def features():
    """Where tasks part, so that half of the prompts are of each."""
    FIRST[:] = [own.features[0] for own in ENGINE.complete(REQUESTS, METHOD)]


def in_turn(own, experience, requests=REQUESTS):
    """Completions of prompts that come one after another, each learnt from."""
    done = []
    for request in requests:
        done += own.complete([request], experience.over(METHOD))
        last = done[-1]
        experience.saw(last.task, last.confidence, last.route, last.record.log_weights)
    return done


def test_after_the_first_prompt_of_a_task_nothing_is_lost():
    """The target is one of the drafters, and the router never begins with it."""
    done, seen = in_turn(ENGINE, Experience([1, 0], 3, 0.0)), set()
    without = ENGINE.complete(REQUESTS, METHOD)
    assert [own.ids for own in done] == [own.ids for own in without]
    for own, other in zip(done, without, strict=True):
        accuracy = [c.counts.accepted_by_position.sum() / c.counts.drafted_by_position.sum() for c in (own, other)]
        assert (own.route == TRUNK and accuracy[0] == 1.0) if own.task in seen else own.route == other.route
        assert accuracy[1] < 1.0
        seen.add(own.task)
    assert seen == {0, 1}


def test_under_gumbel_coupling_the_text_does_not_depend_on_what_was_learnt():
    own = engine(hedged(TARGET, K, 3, window=4), verify.gumbel, (), recorder=choices(3), slots=1)
    requests = [dataclasses.replace(request, temperature=1.0) for request in REQUESTS[:6]]
    done = in_turn(own, Experience([1, 0], 3, 0.0), requests)
    without = own.complete(requests, METHOD)
    assert [one.ids for one in done] == [one.ids for one in without]
    assert [one.route for one in done] != [one.route for one in without]


def test_recorders_together_record_what_each_of_them_does():
    own = engine(hedged(TARGET, K, 3, window=4), verify.greedy, (), recorder=together(logprobs(8), choices(3)))
    for both, one in zip(own.complete(REQUESTS[:4], METHOD), ENGINE.complete(REQUESTS[:4], METHOD), strict=True):
        np.testing.assert_array_equal(both.record[1].rounds, one.record.rounds)
        assert (both.record[0].raw < 0).all() and both.ids == one.ids


@pytest.fixture(scope="module")
def job(corrupted, pool, world, tmp_path_factory):
    """`job(name, *flags)`: records of a job, one prompt at a time; an equal job has compiled its engine."""
    folder, made, real = tmp_path_factory.mktemp("job"), {}, pooled.online
    lines = [line for file in sorted(world.prompts.iterdir()) for line in file.read_text().splitlines()[:4]]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")

    def engine_of(*known, **shape):
        kind = known[1], shape["slots"], shape["recorder"] is NOTHING
        made[kind] = made.get(kind) or real(*known, **shape)
        return made[kind]

    def answer(name, *flags, batch=1, k=2):
        command = ["--pool", pool, "--input", folder / "in.jsonl", "--output", folder / name, "--batch", batch]
        command += ["--max-new-tokens", 14, "--num-speculative-tokens", k, *flags]
        command_line(generate.Generate, generate.run, argv=[str(word) for word in command])
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_pool", lambda *paths, **places: corrupted)
        patch.setattr(pooled, "online", engine_of)
        yield answer


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_job_remembers_and_goes_on_where_it_was_from_its_records_alone(job):
    file = job("whole.jsonl", "--online", "--remember")
    whole, written = records(file), file.read_bytes()
    forgetful = records(job("without.jsonl", "--online"))
    assert [own["text"] for own in whole] == [own["text"] for own in forgetful]
    assert all(len(own["log_weights"]) == 5 for own in whole) and "log_weights" not in forgetful[0]
    for task in {own["task"] for own in whole}:
        drafters = [own["drafter"] for own in whole if own["task"] == task]
        assert drafters[0] == task and (task == "task 2" or task not in drafters[2:])
    for share in (0.35, 0.8):
        file.write_bytes(written[: int(share * len(written))])
        job("whole.jsonl", "--online", "--remember")
        assert file.read_bytes() == written


def test_where_nothing_is_drafted_there_is_nothing_to_learn(job):
    file = job("none.jsonl", "--online", "--remember", "--replay", 6, k=0)
    assert all(own["num_draft_tokens"] == 0 and "log_weights" not in own for own in records(file))
    assert not file.with_name("none.jsonl.replay.npz").exists()


def test_a_job_keeps_a_bounded_sample_of_features_that_does_not_depend_on_the_order_or_on_being_cut_off(job):
    file = job("kept.jsonl", "--online", "--replay", 6)
    kept = file.with_name("kept.jsonl.replay.npz")
    once, written = Served(**read_arrays(kept)), file.read_bytes()
    by_id = {own["id"]: own for own in records(file)}
    assert once.name.tolist() == shift.kept(by_id, 6)
    for i, name in enumerate(once.name):
        own = by_id[name]
        assert f"task {once.task[i]}" == own["task"]
        assert (once.accepted[i], once.drafted[i]) == (own["num_accepted_tokens"], own["num_draft_tokens"])
        begun = prior(jnp.array([["task 0", "task 1", "task 2", "mixed", "trunk"].index(own["drafter"])]), 5)[0]
        np.testing.assert_allclose(once.agreement[i], np.array(own["log_weights"]) - begun, atol=1e-5)
    file.write_bytes(written[: len(written) // 2])
    job("kept.jsonl", "--online", "--replay", 6)
    assert file.read_bytes() == written
    for ours, theirs in zip(Served(**read_arrays(kept)), once, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("flag", [("--remember",), ("--replay", 4)])
def test_what_is_learnt_online_needs_online(job, flag, capsys):
    with pytest.raises(SystemExit):
        job("out.jsonl", *flag)
    assert f"{flag[0]} needs --online" in capsys.readouterr().err
