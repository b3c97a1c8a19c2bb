"""The bench's figures: equality holds for every prompt whatever its bucket, and the JSON has the fields that it promises."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from decode import methods, throughput
from decode.bench import run
from decode.figures import Ask, first_differences
from decode.settings import Bench
from decode.summary import summary
from decode.throughput import Throughput
from jaxspec import pooled, prepared, router, serving, shift
from jaxspec.adapters import Stacked
from jaxspec.config import UserError
from jaxspec.requests import Request
from jaxspec.router import TRUNK
from jaxspec.store.families import options
from jaxspec.store.loading import load_pool
from jaxspec.store.names import FEATURE, MERGED, REPLAY
from jaxspec.store.names import METHODS as pool_methods
from jaxspec.store.prompts import Line
from jaxspec.store.stages import read_arrays
from jaxspec.transformer import NARROW

FIELDS = {
    "tokens_per_second",
    "prompts", "tokens", "seconds", "prefill_seconds", "decode_seconds", "draft_accuracy", "draft_acceptance_rate",
    "mean_acceptance_length", "acceptance_by_position", "equal_to_autoregressive", "equal_to_fastest_autoregressive",
    "speedup_vs_autoregressive", "speedup_vs_base", "nodes_a_round", "drafter_calls_a_round",
}  # fmt: skip
METHODS = tuple(name for name in pool_methods if name not in (*MERGED, FEATURE))


@pytest.fixture(scope="module")
def bench(pool, tmp_path_factory):
    """Short and long prompts in turn, so that batches by bucket are not in the order of the prompts."""
    folder = tmp_path_factory.mktemp("bench")
    words = "the cat sat on the mat and looked at the moon "
    prompts = [{"id": str(i), "task": "one", "prompt": f"{i} {words * (1 + 2 * (i % 2 == 0))}"} for i in range(6)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    out = folder / "bench.json"
    run(
        Bench(
            pool=str(pool),
            prompts=str(folder / "eval.jsonl"),
            json=str(out),
            methods=METHODS,
            passes=1,
            max_new_tokens=8,
            widths=(1, 2),
            num_speculative_tokens=2,
            nodes=5,
            depth=2,
            beam=2,
            layers=3,
            layer_nodes=2,
        )
    )
    return json.loads(out.read_text())


def test_all_is_what_the_pool_has_and_says_how_to_make_the_rest(pool, capsys):
    found = methods.expanded(("all", "online"), Path(pool))
    said = capsys.readouterr().out
    lacking = {*MERGED, FEATURE}
    assert set(found) == {*pool_methods} - lacking - {"online-wrong"} and len(set(found)) == len(found)
    assert {name for name in lacking if f"has no {name}; `python -m train." in said} == lacking
    assert "empty table; `python -m train.extras`" in said
    assert set(methods.RECIPES) == {*pool_methods} - {*MERGED}
    assert methods.expanded(("base", "routed"), Path(pool)) == ("base", "routed")


def test_the_summary_says_what_methods_cost(bench, loaded):
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in summary(bench)}
    assert {"method", "routed", "tree"} <= set(lines)
    trained = loaded.facts["trained"]
    parameters = lambda *parts: sum(trained[part]["parameters"] for part in parts)
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded.pair.draft.params))
    assert trained["trunk"]["parameters"] == trained["mixed"]["parameters"] == size
    assert lines["mixed"][-2] == f"{parameters('trunk', 'mixed'):,}" and lines["base"][-2] == "0"
    assert lines["routed"][-2] == f"{parameters('trunk', 'specialists'):,}"
    assert lines["routed"][-3] == "yes" and float(lines["routed"][-1].rstrip(" |")) > 0
    assert summary({**bench, "trained": dict.fromkeys(bench["trained"])})[-1].endswith("| - | - |")


def test_every_method_emits_what_autoregressive_decoding_emits(bench):
    for name in METHODS:
        row = bench["tasks"]["one"][name]
        assert row["equal_to_autoregressive"] == 1.0
        assert row["prompts"] == 6
        assert row["tokens"] == bench["tasks"]["one"]["autoregressive"]["tokens"]


def test_the_json_has_its_fields(bench):
    assert bench["schema"] == 1 and bench["autoregressive_width"] in (1, 2)
    for name in METHODS:
        assert bench["tasks"]["one"][name].keys() == bench["mean"][name].keys() == FIELDS
    assert bench["tasks"]["one"]["autoregressive"]["draft_accuracy"] is None
    cost = lambda name: [bench["mean"][name][field] for field in ("nodes_a_round", "drafter_calls_a_round")]
    assert [cost(name) for name in ("routed", "ngram", "multi-draft", "card")] == [[2, 2], [2, 0], [4, 2], [2, 3]]
    trees = ("tree", "graph", "merged-trees", "merged-trees-two-best", "adaptive")
    assert [cost(name) for name in trees] == [[5, 2], [5, 2], [5, 4], [5, 4], [5, 0]]
    assert bench["tree"] == {"nodes": 5, "depth": 2, "beam": 2, "ancestors": 1}
    length = {name: bench["mean"][name]["mean_acceptance_length"] for name in ("routed", "tree")}
    assert length["tree"] >= length["routed"] > 1
    assert bench["tasks"]["one"]["autoregressive"]["speedup_vs_autoregressive"] == 1.0
    assert sum(bench["choices"]["one"].values()) == 6 and all(
        said.endswith("K = 2") for said in bench["choices"]["one"]
    )
    for name in ("online", "online-wrong"):
        rounds = sum(bench["rounds_by_drafter"][name]["one"].values())
        row = bench["tasks"]["one"][name]
        assert rounds == pytest.approx(row["tokens"] / row["mean_acceptance_length"])
    counts = bench["router"]["confusion"]["counts"]
    assert sum(map(sum, counts)) == 6
    rate = lambda name: bench["mean"][name]["speedup_vs_autoregressive"]
    assert bench["router"]["regret"] == pytest.approx(1 - rate("routed") / rate("oracle"))  # one task, one pass


@pytest.mark.parametrize(("drafts", "k"), [(0, 4), (5, 4)])
def test_a_number_of_drafts_that_slots_have_no_room_for_is_told(drafts, k):
    with pytest.raises(UserError, match=f"--drafts {drafts} at each of {k}"):
        methods.drafts(Bench(pool="", drafts=drafts), k)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes": 65}, "--nodes 65 --depth 6 --beam 4 will not do; give 1 to 64 nodes"),
        ({"depth": 0}, "--nodes 16 --depth 0 --beam 4 will not do"),
        ({"nodes": 5}, "--nodes 5 --depth 6 --beam 4 will not do; give 1 to 64 nodes, a depth from 1 to as many"),
        (
            {"depth": 2, "beam": 3},
            "a --beam of 3 and --depth 2 meet 12 tokens, too few for --nodes 16; raise beam or depth",
        ),
        ({"ancestors": -1}, "--ancestors -1 will not do; give a whole number from 0"),
        ({"methods": ("adaptive",), "nodes": 5}, "--nodes 5 --depth 6 --beam 4 will not do"),
        ({"methods": ("adaptive",), "beam": 25}, "--beam 25 will not do; `adaptive` knows at most 24 successors"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(pool, settings, said):
    with pytest.raises(UserError, match=said):
        run(Bench(pool=str(pool), **({"methods": ("tree", "graph")} | settings)))


def knowing(pool, lengths, rounds=None, fastest=2, **facts):
    """The pool, had calibration measured these tokens a round by drafter and task, and these milliseconds a round."""
    rounds = rounds or {k: 1.0 for k in range(3)}
    rate = lambda k: 9.0 if k == fastest else float(k)
    calibration = {k: {"tokens_per_second": rate(k), "round_milliseconds": own} for k, own in rounds.items()}
    known = {"acceptance_length": lengths, "calibration_by_slots": {1: calibration}, **facts}
    return dataclasses.replace(pool, facts={**pool.facts, **known}, normal=None)


def features_of(pool):
    """Features of prompts that belong anywhere."""
    return np.random.default_rng(0).normal(size=(64, pool.pair.target.config.width)).astype(np.float32)


def test_a_task_whose_adapter_gains_nothing_is_served_without_and_keeps_its_name(loaded):
    better, fewer, even = [1.0, 9.0, 2.5], [1.0, 9.0, 1.5], [1.0, 1.0, 2.0]
    lengths = {
        "base": [fewer] * 3,
        "trunk": [even] * 3,
        "task 0": [even, *[better] * 2],
        "task 1": [fewer, better, fewer],
    }
    pool = knowing(loaded, {**lengths, "task 2": [better, better, None], "mixed": [even] * 3}, fallback_below=0.0)
    assert pool.drafters == [TRUNK, 1, 2]
    assert knowing(loaded, pool.facts["acceptance_length"], fastest=0).drafters == pool.drafters
    found = serving.routed(pool, 1).route(features_of(loaded))
    assert set(found.task) == {0, 1, 2}
    assert (found.route == np.where(found.task == 0, TRUNK, found.task)).all()
    unsure = dataclasses.replace(pool, facts={**pool.facts, "fallback_below": 1.1})
    assert (serving.routed(unsure, 1).route(features_of(loaded)).route == TRUNK).all()


def test_the_chosen_drafter_and_length_are_those_of_the_least_expected_time(loaded):
    """Task 0 is drafted best by its own, task 1 by mixed, and on task 2 nobody's drafts are worth their time."""
    none, some, most = [1.0, 1.0, 1.0], [1.0, 1.6, 2.0], [1.0, 1.8, 2.6]
    lengths = {"task 0": [most, none, none], "task 1": [none, none, none], "task 2": [none, none, none]}
    pool = knowing(
        loaded,
        {**lengths, "mixed": [some, most, none], "base": [none] * 3, "trunk": [none] * 3},
        {0: 1.0, 1: 1.5, 2: 2.0},
    )
    assert options(pool.facts).families == (("", (0, 2)),)
    found = serving.chosen(pool, 1, options(pool.facts)).route(features_of(pool))
    sure = found.confidence > 0.95
    assert set(found.task[sure]) == {0, 1, 2}
    assert (found.route[sure] == np.array([0, 3, TRUNK])[found.task[sure]]).all()
    assert (found.num_speculative_tokens[sure] == np.array([2, 2, 0])[found.task[sure]]).all()
    unsure = dataclasses.replace(pool, facts={**pool.facts, "fallback_below": 1.1})
    fallen = serving.chosen(unsure, 1, options(unsure.facts)).route(features_of(pool))
    assert set(fallen.task) == set(found.task)
    assert {loaded.names[route] for route in fallen.route} == {"base"} or (fallen.num_speculative_tokens == 0).all()
    knows_its_prompts = dataclasses.replace(pool, normal=loaded.normal)
    lost = dataclasses.replace(pool, normal=loaded.normal._replace(distance=loaded.normal.distance / 99))
    strange = serving.chosen(lost, 1, options(pool.facts)).route(features_of(pool))
    assert (strange.route == fallen.route).all() and (strange.task == found.task).all()
    task, scaled = found.task, np.asarray(router.standardised(loaded.router, features_of(loaded)))
    own = shift.distances(loaded.normal, scaled)[np.arange(len(task)), task]
    beyond = lambda i: dataclasses.replace(pool, normal=loaded.normal._replace(distance=np.full(3, own[i] / 1.2)))
    for i in np.flatnonzero(task < 2)[
        :3
    ]:  # a little farther than its task's limit; on task 2 mixed is not worth its time
        assert serving.chosen(beyond(i), 1, options(pool.facts)).route(features_of(loaded)[i : i + 1]).route == 3
    own = read_arrays(loaded.path / REPLAY)["features"]
    alike = [serving.chosen(one, 1, options(one.facts)).route(own).route for one in (knows_its_prompts, pool)]
    assert (alike[0] == alike[1]).mean() > 0.9 and (alike[1] != fallen.route[0]).any()
    several = serving.chosen(pool, 4, options(pool.facts, 2, 4))
    united = several.route(features_of(pool))
    assert (united.route == 3).all() and several.drafter_params(united.route[:4]).bank is None
    banked = serving.chosen(pool, 4, options(pool.facts, 2, 4), bank=True).route(features_of(pool))
    assert 3 not in banked.route and (banked.route[sure & (found.task == 0)] == 0).all()


def specialised(facts: dict, mixed: float) -> dict:
    """Facts of a pool whose specialists have 4 tokens a round on their own tasks, else one, and mixed as many everywhere."""
    of = lambda task: [[4.0] * 17 if other == task else [1.0] * 17 for other in range(3)]
    everywhere = lambda tokens: [[tokens] * 17] * 3
    lengths = {f"task {task}": of(task) for task in range(3)}
    lengths |= {"mixed": everywhere(mixed)} | {name: everywhere(1.0) for name in ("base", "trunk")}
    return facts | {"acceptance_length": lengths, "sizes": [1, 1, 1], "fallback_below": 0.0}


@pytest.mark.parametrize(
    ("mixed", "bank", "united"), [(3.0, 1.0, False), (3.0, 1.5, True), (4.5, 1.0, True), (1.0, 3.0, False)]
)
def test_rows_share_the_mixed_drafter_only_where_it_is_faster_than_each_ones_own(loaded, mixed, bank, united):
    """4 tokens of a row's own drafter, in rounds that take `bank` times as long, against those of mixed."""
    rows = {2: {"tokens_per_second": 1.0, "round_milliseconds": bank, "mixed_round_milliseconds": 1.0}}
    facts = specialised(loaded.facts, mixed) | {"calibration_by_slots": {4: rows}}
    pool = dataclasses.replace(loaded, facts=facts, normal=None)
    found = serving.chosen(pool, 4, options(facts, slots=4)).route(features_of(loaded))
    assert (found.route == 3).all() == united
    if not united:
        assert (found.route == found.task).all()
    assert serving.chosen(pool, 4, options(facts, 2)).route(features_of(loaded)).route.tolist() == (
        [3] * len(found.route) if mixed > 4 else found.task.tolist()
    )


def test_what_is_chosen_is_expected_to_be_no_slower_than_any_single_drafter():
    """Of any table of seconds a token by drafter, task and length, for prompts whose task is known."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        seconds = rng.lognormal(size=(5, 3, 4))
        share = rng.dirichlet(np.ones(3))
        drafter, length = router.fastest(np.eye(3), seconds)
        chosen = share @ seconds[drafter, np.arange(3), length]
        assert chosen <= np.einsum("t,dtk->dk", share, seconds).min() + 1e-12


def test_a_prompt_between_tasks_gets_what_serves_both():
    seconds = router.token_seconds(np.array([[[3.0], [1.0]], [[1.0], [3.0]], [[2.0], [2.0]]]), np.ones(1))
    probability = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    drafter, length = router.fastest(probability, seconds)
    assert drafter.tolist() == [0, 1, 2] and length.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_a_pool_laid_out_for_a_cpu_gives_the_same_texts_by_every_method(pool, monkeypatch):
    """Merged weights, the bank and the control, on plain kernels and on kernels laid out for few rows."""
    own = load_pool(pool)
    requests = [Request(ids=(1, 3, 20 + i, 300), max_new_tokens=8, number=i) for i in range(3)]

    monkeypatch.setattr(prepared, "blocks_pay", lambda params: True)

    def texts(wide):
        monkeypatch.setattr(prepared, "WIDE", wide)
        prepared.target_in_blocks.cache_clear()
        prepared.adapted.cache_clear()
        serving.always.cache_clear()
        for slots in (1, 2):
            engine = pooled.speculative(own, 2, slots=slots, room=64)
            in_blocks = engine._target_params["layers"][0]["mlp"]["up"]["kernel"].ndim == 3
            assert in_blocks == (wide * slots <= NARROW and jax.default_backend() == "cpu")
            for routes in ([-1] * 3, [1] * 3, [0, 2, -1]):
                asked = [dataclasses.replace(r, route=t) for r, t in zip(requests, routes, strict=True)]
                yield [c.ids for c in engine.complete(asked, serving.given(own, slots))]
            yield [c.ids for c in engine.complete(requests, serving.always(own, "mixed", slots))]

    assert list(texts(8)) == list(texts(NARROW + 1))


def test_rows_that_draft_with_kernels_side_by_side_have_the_texts_and_counts_of_the_bank(pool, monkeypatch):
    """What an accelerator does with small drafters."""
    own = load_pool(pool)
    requests = [Request(ids=(1, 3, 20 + i, 300), max_new_tokens=12, number=i, route=i % 4 - 1) for i in range(6)]
    said = {}
    for name in ("bank", "stack"):
        prepared.adapted.cache_clear()
        monkeypatch.setattr(prepared, "stacks", lambda *shape, name=name: name == "stack")
        method = serving.given(own, 2)
        assert isinstance(method.drafter_params(None).bank, Stacked) == (name == "stack")
        done = pooled.speculative(own, 2, slots=2, room=64).complete(requests, method)
        said[name] = [(c.ids, c.counts.num_accepted_tokens) for c in done]
    assert said["stack"] == said["bank"] and sum(accepted for _, accepted in said["bank"]) > 0


def test_throughput_has_a_row_a_number_of_slots(pool, world, tmp_path, capsys):
    out = tmp_path / "throughput.json"
    shared = {"pool": str(pool), "prompts": str(world.prompts), "limit": 3, "passes": 1, "max_new_tokens": 6}
    throughput.run(Throughput(**shared, slots=(1, 2), num_speculative_tokens=2, lengths=(1,), json=str(out)))
    rows = json.loads(out.read_text())["rows"]
    assert [row["slots"] for row in rows] == [1, 2]
    for row in rows:
        assert all(row[name]["tokens_per_second"] > 0 for name in throughput.METHODS)
        assert row["autoregressive"]["mean_acceptance_length"] == 1.0
        assert row["routed"]["mean_acceptance_length"] >= 1.0
        rates = {int(k): rate for k, rate in row["by_length"].items()}
        assert rates.keys() == {0, 1, 2} and rates[2] == row["routed"]["tokens_per_second"]
        assert rates[row["best"]] == max(rates.values())
    assert capsys.readouterr().out.count("\n|") == 4


def test_where_two_texts_part_the_two_tokens_and_their_logits_are_told(loaded):
    """One text exchanged at a place is found there, with the logits that the target has for the two; an equal one is not."""
    requests = [Request(ids=(1, 3, 20 + i, 300), max_new_tokens=8, number=i) for i in range(2)]
    line = Line("a", [], None, None, {}, "")
    asks = [Ask(line, request, "one", -1) for request in requests]
    engine = pooled.autoregressive(loaded, 1, slots=1, room=64)
    own = engine.complete(requests, serving.always(loaded, "autoregressive", 1))
    one = {i: completion.ids for i, completion in enumerate(own)}
    wide = {0: one[0], 1: [*one[1][:3], one[1][3] + 1, *one[1][4:]]}
    (found,) = first_differences(loaded, asks, one, wide)
    assert (found["position"], found["tokens"]) == (3, [one[1][3], one[1][3] + 1])
    assert found["logits"][0] > found["logits"][1] and found["gap"] > 0
    assert first_differences(loaded, asks, one, one) == []
