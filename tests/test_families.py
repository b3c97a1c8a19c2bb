"""One prompt at a time a pool chooses among families of drafters: its own, n-gram lookup, another pool of its target."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxspec import forced, pooled, serving
from jaxspec.adapters import init_bank
from jaxspec.config import UserError
from jaxspec.drafters import ngram_drafter
from jaxspec.engine import Method, unrouted
from jaxspec.requests import MAX_DRAFT, Request
from jaxspec.router import TRUNK
from jaxspec.store.facts import calibration
from jaxspec.store.families import companion, drafter_name, options, routes_outside
from jaxspec.store.loading import load_pool
from jaxspec.store.names import BANK, MIXED, digest_of_added, extra_file
from jaxspec.store.stages import read_arrays
from jaxspec.store.traces import read_traces
from jaxspec.store.trees import write_tree
from jaxspec.text import generate
from tests.test_rivals import change
from train import calibrate

IDS = [tuple(np.random.default_rng(i).integers(8, 64, size=4 + i).tolist()) for i in range(6)]


@pytest.fixture(scope="module")
def perfect(pool, loaded, tmp_path_factory) -> Path:
    """A pool whose base drafter is the target and whose adapters change nothing."""
    folder = tmp_path_factory.mktemp("perfect") / "pool"
    shutil.copytree(pool, folder)
    params = loaded.pair.target.params
    write_tree(folder / BANK, init_bank(params, jax.random.key(0), tasks=3, rank=loaded.facts["rank"]))
    write_tree(folder / MIXED, params)
    return change(folder, lambda own: {"draft": own["target"], "trunk": False, "mixed": "mixed_full"})


@pytest.fixture(scope="module")
def calibrated(finished, perfect, tmp_path_factory):
    """The experiment's pool, calibrated with n-gram lookup and the perfect pool beside its own drafters."""
    out = tmp_path_factory.mktemp("families")
    for name in ("trace", "partition", "align", "router"):
        (out / name).symlink_to(Path(finished.out, name))
    spec = dataclasses.replace(finished.calibrate, further=("ngram", f"big={perfect}"))
    calibrate.run(dataclasses.replace(finished, out=str(out), calibrate=spec))
    return load_pool(str(out / "pool"))


def test_what_every_family_would_have_had_accepted_is_measured(calibrated, finished):
    further = calibrated.facts["further"]
    assert list(further) == ["ngram", "big"]
    big = {f"big/{name}" for name in [*calibrated.tasks, "mixed", "base"]}
    assert further["big"]["acceptance_length"].keys() == big
    traces, partition = read_traces(finished.out), read_arrays(Path(finished.out, "partition", "partition.npz"))
    texts = [np.flatnonzero((partition["split"] == 1) & (partition["task"] == task)) for task in range(3)]
    for task, rows in enumerate(texts):  # the target agrees with itself: the fewest rounds that there can be
        ends = [len(traces.tokens[i]) - traces.prompt_length[i] for i in rows]
        fewest = sum(ends) / sum(-(-end // 3) for end in ends) if len(rows) else None
        for name in big:
            found = further["big"]["acceptance_length"][name][task]
            assert (found and found[2]) == pytest.approx(fewest)
        runs = forced.lookups(ngram_drafter(MAX_DRAFT), traces, rows.tolist())
        found = further["ngram"]["acceptance_length"]["ngram"][task]
        assert (found and found[2]) == (forced.acceptance_length([run[:, 2] for run in runs], 2) if len(rows) else None)
    for own in further.values():
        assert own["calibration"].keys() == {"1", "2"} and own["calibration"]["2"]["round_milliseconds"] > 0


@pytest.fixture(scope="module")
def grown(finished, calibrated, perfect, world, tmp_path_factory):
    """To calibrate a finished pool that was given two drafters, with one of them and the target's folder."""
    folder = tmp_path_factory.mktemp("grown") / "pool"
    shutil.copytree(calibrated.path, folder)
    write_tree(extra_file(folder, "mine"), calibrated.drafter("task 1"))
    write_tree(extra_file(folder, "unmeasured"), calibrated.mixed)
    further = ("ngram", f"big={perfect}", "mine", f"alone={world.target}")
    return again(finished, folder, further, tmp_path_factory.mktemp("larger"))


def again(finished, folder: Path, further: tuple[str, ...], out: Path):
    spec = dataclasses.replace(finished.calibrate, further=further)
    return dataclasses.replace(finished, pool=str(folder), out=str(out), calibrate=spec)


@pytest.fixture(scope="module")
def larger(grown):
    calibrate.run(grown)
    return load_pool(str(Path(grown.out, "pool")))


def test_a_finished_pool_is_calibrated_with_what_was_added(calibrated, grown, larger, capsys):
    own, before = larger.facts["acceptance_length"], calibrated.facts["acceptance_length"]
    assert own == before | {"mine": before["task 1"]} and list(larger.facts["further"]) == ["ngram", "big", "alone"]
    alone, big = (larger.facts["further"][name]["acceptance_length"] for name in ("alone", "big"))
    assert alone == {"alone": big["big/base"]}  # both are the target
    assert larger.facts["added"] == {"mine": digest_of_added(larger.path, "mine"), "unmeasured": ""}
    assert options(larger.facts).names == (*larger.names, "mine", "ngram", *big, "alone")
    assert [drafter_name(larger.facts, route) for route in routes_outside(larger.facts).values()] == [
        "mixed", "base", "mine", "unmeasured"
    ]  # fmt: skip
    calibrate.run(grown)
    assert "pool complete" in capsys.readouterr().out


def test_the_pool_chooses_what_was_added_and_a_drafter_in_a_folder(larger, world):
    best = {0: ("mine", 2), 1: ("alone", 2), 2: ("mixed", 1)}
    pool = knowing(larger, best)
    prompts = [json.loads(file.read_text().splitlines()[0])["prompt"] for file in sorted(world.prompts.iterdir())]
    done = list(generate(pool, prompts, batch=1, max_new_tokens=12))
    assert [own.drafter for own in done] == [best[pool.tasks.index(own.task)][0] for own in done]
    assert {own.drafter for own in done} == {"mine", "alone", "mixed"}
    plain = generate(pool, prompts, batch=1, max_new_tokens=12, num_speculative_tokens=0)
    assert [own.token_ids for own in done] == [own.token_ids for own in plain]
    counted = lambda own: (own.num_draft_tokens, own.num_accepted_tokens)
    for own, prompt in zip(done, prompts, strict=True):
        if own.drafter == "alone":  # the target drafts
            assert own.num_accepted_tokens == own.num_draft_tokens > 0
        if own.drafter == "mine":
            [same] = generate(pool, [prompt], batch=1, max_new_tokens=12, drafter="task 1", num_speculative_tokens=2)
            assert counted(own) == counted(same)


def test_a_drafter_that_has_changed_is_not_chosen_until_it_is_measured_again(finished, larger, tmp_path, capsys):
    route = options(larger.facts).names.index("mine")
    file = extra_file(larger.path, "mine")
    before = file.read_bytes()
    write_tree(file, larger.drafter("task 2"))
    with pytest.raises(UserError, match=r"mine\.safetensors has changed since .*`python -m train\.calibrate --pool"):
        larger.weights(route)
    calibrate.run(again(finished, larger.path, ("mine",), tmp_path))
    assert "ngram, big, alone, which" in capsys.readouterr().out  # nobody has asked for these again
    found = load_pool(str(tmp_path / "pool"))
    assert found.facts["acceptance_length"]["mine"] == larger.facts["acceptance_length"]["task 2"]
    assert found.weights(found.names.index("task 2")) is not None
    assert found.weights(options(found.facts).names.index("mine")) is not None
    file.write_bytes(before)


def knowing(pool, best: dict[int, tuple[str, int]]):
    """The pool, had calibration found these (drafter, draft length) the fastest on the tasks."""
    names = [*pool.facts["acceptance_length"]]
    further = pool.facts["further"]
    all_lengths = range(1, MAX_DRAFT + 1)
    lengths = lambda name: [[1.0, *(9.0 if best[t] == (name, k) else 1.0 for k in all_lengths)] for t in range(3)]
    rounds = lambda own: {k: {"tokens_per_second": float(k), "round_milliseconds": 1.0} for k in calibration(own)}
    known = {
        "calibration_by_slots": {1: rounds(pool.facts)},
        "acceptance_length": {name: lengths(name) for name in names},
        "fallback_below": 0.0,
    }
    of = lambda own: {
        **own,
        "calibration": rounds(own),
        "acceptance_length": {n: lengths(n) for n in own["acceptance_length"]},
    }
    known["further"] = {name: of(own) for name, own in further.items()}
    return dataclasses.replace(pool, facts={**pool.facts, **known}, normal=None)


def test_a_family_that_is_nowhere_the_fastest_is_not_loaded(calibrated):
    own = options(knowing(calibrated, {0: ("task 0", 2), 1: ("task 1", 1), 2: ("mixed", 2)}).facts)
    assert own.families == (("", (1, 2)),) and (own.family == [0] * 6 + [-1] * 6).all()
    measured = knowing(calibrated, {0: ("task 0", 2), 1: ("task 1", 1), 2: ("mixed", 2)}).facts
    nothing = {
        **calibration(measured),
        0: {"tokens_per_second": 3.0, "round_milliseconds": 9.0},
    }  # the own alone have it
    assert options({**measured, "calibration_by_slots": {1: nothing}}).families == (("", (0, 1, 2)),)
    some = options(knowing(calibrated, {0: ("task 0", 2), 1: ("ngram", 1), 2: ("ngram", 1)}).facts)
    assert some.families == (("", (2,)), ("ngram", (1,)))
    assert np.isinf(some.seconds[some.names.index("ngram"), :, 1]).all()
    assert np.isfinite(some.seconds[:6, :, 1]).all() and np.isinf(some.seconds[:6, :, 0]).all()


def test_each_prompt_is_drafted_by_its_family_and_all_texts_are_the_targets(calibrated):
    best = {0: ("task 0", 2), 1: ("ngram", 1), 2: ("big/task 1", 2)}
    pool = knowing(calibrated, best)
    among, shape = options(pool.facts), {"slots": 1, "room": 96}
    engine = pooled.choosing(pool, among.families, **shape)
    requests = [Request(ids=ids, max_new_tokens=12, number=i) for i, ids in enumerate(IDS)]
    method = serving.chosen(pool, 1, among)
    turn = lambda features: method.route(features)._replace(**routes(pool, among, best, next(numbers)))
    numbers = iter(range(len(IDS)))
    done = engine.complete(requests, method._replace(route=turn))
    plain = pooled.autoregressive(pool, 1, **shape).complete(requests, Method("plain", unrouted, lambda routes: ()))
    assert [own.ids for own in done] == [own.ids for own in plain]
    said = [drafter_name(pool.facts, own.route) for own in done]
    assert said == ["task 0", "ngram", "big/task 1"] * 2
    assert [own.num_speculative_tokens for own in done] == [2, 1, 2] * 2
    for own in done[2::3]:  # the target drafts: nothing is lost
        assert own.counts.num_accepted_tokens == own.counts.num_draft_tokens > 0
    alone = pooled.alone(pool, "ngram", 1, **shape).complete(requests[1::3], serving.always(pool, "ngram", 1))
    counted = lambda completions: [own.counts.num_accepted_tokens for own in completions]
    assert counted(done[1::3]) == counted(alone)


def routes(pool, among, best, number: int) -> dict:
    """The route of the task's best drafter, and its length, for prompts that take turns."""
    name, k = best[number % 3]
    return {"route": np.array([among.names.index(name)]), "num_speculative_tokens": np.array([k])}


def test_the_choice_follows_the_tasks(calibrated):
    pool = knowing(calibrated, {0: ("ngram", 2), 1: ("big/mixed", 1), 2: ("trunk", 1)})
    among = options(pool.facts)
    features = np.random.default_rng(0).normal(size=(64, pool.pair.target.config.width)).astype(np.float32)
    method = serving.chosen(pool, 1, among)
    found = method.route(features)
    expected = [among.names.index("ngram"), among.names.index("big/mixed"), TRUNK]
    sure = found.confidence > 0.95
    assert (found.route[sure] == np.array(expected)[found.task[sure]]).all() and set(found.task[sure]) == {0, 1, 2}
    assert [method.family(route) for route in expected] == [1, 2, 0]
    assert method.drafter_params(np.array(expected[:1])) == ()


def test_a_companion_that_has_changed_is_refused(calibrated, tmp_path):
    moved = {**calibrated.facts["further"]["big"], "digest": "other"}
    pool = dataclasses.replace(calibrated, facts={**calibrated.facts, "further": {"big": moved}})
    with pytest.raises(UserError, match=r"has changed since .* was calibrated with it"):
        companion(pool, "big")


@pytest.mark.parametrize(
    "further", [("big",), ("ngram", "ngram=x"), ("a=x", "a=y"), ("ngram", "ngram"), ("mixed=x",), ("mixed",)]
)
def test_families_need_a_form_and_a_name_of_their_own(finished, out_with, further):
    out = out_with("trace", "partition", "align", "router")
    spec = dataclasses.replace(finished.calibrate, further=further)
    with pytest.raises(UserError, match=r"--calibrate\.further"):
        calibrate.run(dataclasses.replace(finished, out=str(out), calibrate=spec))
