"""A rival pool is measured as if it were alone: its own drafters, router, clusters and draft length, on shared weights."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decode import bench, rivals
from decode.figures import Ask, Result, router_figures
from jaxspec import prepared
from jaxspec.adapters import init_bank
from jaxspec.config import UserError
from jaxspec.engine import Seconds
from jaxspec.metrics import Counts
from jaxspec.requests import Completion, Request
from jaxspec.store.facts import draft_length
from jaxspec.store.families import Place
from jaxspec.store.loading import load_beside
from jaxspec.store.names import BANK, MIXED, ROUTER
from jaxspec.store.prompts import Line
from jaxspec.store.trees import write_tree

TURN = 1  # places by which the turned pool's tasks are moved
KNOWN = "sailing"


def change(folder: Path, make) -> Path:
    """Rewrites what a pool's manifest says of its results."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["results"] |= make(manifest["results"])
    file.write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def turned(pool, tmp_path_factory) -> Path:
    """The pool with its tasks in another order: each task's drafter, output of the router and facts have moved."""
    folder = tmp_path_factory.mktemp("turned") / "pool"
    shutil.copytree(pool, folder)
    turn = lambda values: values[-TURN:] + values[:-TURN]
    bank, router = load_file(folder / BANK), load_file(folder / ROUTER)
    save_file({name: np.roll(leaf, TURN, axis=0) for name, leaf in bank.items()}, folder / BANK)
    outer = {name: np.roll(leaf, TURN, axis=-1) for name, leaf in router.items() if "outer" in name}
    assert len(outer) == 2
    save_file({**router, **outer}, folder / ROUTER)

    def facts(own: dict) -> dict:
        lengths = {name: turn(rows) for name, rows in own["acceptance_length"].items()}
        lengths |= dict(zip(own["tasks"], turn([lengths[name] for name in own["tasks"]]), strict=True))
        return {"labels": turn(own["labels"]), "sizes": turn(own["sizes"]), "acceptance_length": lengths}

    return change(folder, facts)


@pytest.fixture(scope="module")
def perfect(turned, loaded, tmp_path_factory) -> Path:
    """A turned pool whose base drafter is the target, with adapters that spoil it but for one task's; it drafts another number.

    So every token is right of whoever drafts without adapters or with that one, which its router always picks.
    """
    folder = tmp_path_factory.mktemp("perfect") / "pool"
    shutil.copytree(turned, folder)
    params, own = loaded.pair.target.params, json.loads((folder / "manifest.json").read_text())["results"]
    knows = np.array([label == KNOWN for label in own["labels"]])
    spoil = lambda b: np.ones_like(b) * ~knows[:, None, None]
    bank = init_bank(params, jax.random.key(0), tasks=3, rank=own["rank"])
    write_tree(folder / BANK, [{name: (a, spoil(b)) for name, (a, b) in layer.items()} for layer in bank])
    write_tree(folder / MIXED, params)
    always = lambda leaf: np.float32(10.0 * knows) if leaf.ndim == 1 else np.zeros_like(leaf)
    router = load_file(folder / ROUTER)
    save_file({name: always(leaf) if "outer" in name else leaf for name, leaf in router.items()}, folder / ROUTER)
    accepted = {name: 3 * [[1.0, 2.0, 3.0]] for name in own["tasks"]}  # none is served by the base
    accepted |= {name: 3 * [[1.0, 1.0, 1.0]] for name in ("mixed", "base")}
    best = lambda k: {"tokens_per_second": float(k == other_length(loaded)), "round_milliseconds": 1.0}
    known = {"acceptance_length": accepted, "calibration_by_slots": {1: {k: best(k) for k in (1, 2)}}}
    return change(folder, lambda own: {"draft": own["target"], "trunk": False, "mixed": "mixed_full", **known})


def other_length(pool) -> int:
    return 3 - draft_length(pool.facts, least=1)  # calibration of the tests' pool measures 1 and 2


@pytest.fixture(scope="module")
def measured(pool, world, turned, perfect, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("rivals") / "bench.json"
    config = bench.Bench(
        pool=pool,
        prompts=str(world.prompts),
        json=str(out),
        limit=2,
        methods=("base", "routed", "oracle", "turned/oracle", "perfect/mixed", "perfect/oracle"),
        rivals=(f"turned={turned}", f"perfect={perfect},{world.target}"),
        passes=1,
        max_new_tokens=8,
        widths=(1,),
        smallest_bucket=64,
    )
    bench.run(config)
    return json.loads(out.read_text())


def test_every_pool_emits_what_autoregressive_decoding_emits(measured):
    assert list(measured["mean"]) == [
        *("autoregressive", "base", "routed", "oracle", "turned", "turned/oracle"),
        *("perfect", "perfect/mixed", "perfect/oracle"),
    ]
    for rows in measured["tasks"].values():
        assert {row["equal_to_autoregressive"] for row in rows.values()} == {1.0}
        assert len({row["tokens"] for row in rows.values()}) == 1


def test_a_pool_whose_tasks_are_in_another_order_drafts_the_same(measured):
    """So its bank, router and clusters are its own, and belong together."""
    counted = ("draft_accuracy", "mean_acceptance_length", "acceptance_by_position")
    for rows in measured["tasks"].values():
        for mine, other in (("routed", "turned"), ("oracle", "turned/oracle")):
            assert [rows[mine][name] for name in counted] == [rows[other][name] for name in counted]
    routers = measured["router"], measured["rivals"]["turned"]["router"]
    assert routers[0]["accuracy"] == routers[1]["accuracy"] is not None
    counts = [np.array(own["confusion"]["counts"]) for own in routers]
    np.testing.assert_array_equal(np.roll(counts[0][:, :-1], TURN, axis=1), counts[1][:, :-1])


def test_a_rival_that_knows_the_answer_loses_nothing_at_its_own_draft_length(measured, loaded):
    k = other_length(loaded)
    assert measured["rivals"]["perfect"]["num_speculative_tokens"] == k != measured["num_speculative_tokens"]
    for name in ("perfect", "perfect/mixed"):
        assert measured["mean"][name]["draft_accuracy"] == 1.0
        assert measured["mean"][name]["acceptance_by_position"] == [1.0] * k
    for task, rows in measured["tasks"].items():
        assert (rows["perfect/oracle"]["draft_accuracy"] == 1.0) == (task == KNOWN)
    assert measured["mean"]["routed"]["draft_accuracy"] < 1.0
    assert measured["rivals"]["perfect"]["router"]["accuracy"] == pytest.approx(1 / 3)


def test_the_json_says_what_each_pool_is(measured, loaded, experiment):
    size = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {"turned": size(loaded.pair.draft.params), "perfect": size(loaded.pair.target.params)}
    assert measured["drafter_parameters"] == sizes["turned"] and measured["num_tasks"] == 3
    assert measured["training"] == {"steps": 4, "trunk": 0.5, "divergence": experiment.align.divergence}
    assert {name: own["drafter_parameters"] for name, own in measured["rivals"].items()} == sizes
    regrets = {name: own["router"]["regret"] for name, own in measured["rivals"].items()}
    assert all(regret is not None for regret in regrets.values())


def test_weights_of_the_target_are_there_once(loaded, turned, perfect, world):
    """Those of the base drafter too, where it is the same."""
    own, other = load_beside(str(turned), loaded), load_beside(str(perfect), loaded, str(world.target))
    assert own.pair.target is other.pair.target is loaded.pair.target and own.pair.draft is loaded.pair.draft
    assert other.pair.draft.config == loaded.pair.target.config
    assert jax.tree.leaves(other.mixed)[0].dtype == jax.tree.leaves(loaded.mixed)[0].dtype
    blocks = [prepared.target_in_blocks(pool.pair.target) for pool in (loaded, own, other)]
    assert blocks[0] is blocks[1] is blocks[2]


def test_clusters_that_a_line_names_are_not_a_rivals(loaded):
    """Without labels a line of the test split has a cluster in its own pool, and none in another."""
    line = Line("a", [], None, "unheard", {"cluster": 2}, "")
    ask = Ask(line, Request(ids=(1,), max_new_tokens=1), "all", bench._cluster(loaded, line))
    seen = bench._seen_by(loaded, ask)
    assert ask.cluster == 2 and (seen.cluster, seen.line.settings) == (-1, {})


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        (["pool"], ["'pool' will not do", "NAME=POOL,DRAFT"]),
        (["a="], ["'a=' will not do"]),
        (["A=p"], ["small letters"]),
        (["mixed=p"], ["'mixed' already", "give another"]),
        (["trunk=p"], ["'trunk' already"]),  # a drafter of the pool
        (["a=p", "a=q"], ["--rivals a=q", "'a' already"]),
    ],
)
def test_a_rival_that_cannot_be_named(pool, said, parts):
    with pytest.raises(UserError) as refusal:
        rivals.parse(said, pool)
    assert all(part in str(refusal.value) for part in parts)


def test_a_method_belongs_to_the_pool_that_is_named_before_it(pool):
    known = rivals.parse(["a=p", "b=q,d"], pool)
    assert known == [Place("a", "p", ""), Place("b", "q", "d")]
    found = rivals.measured(["routed", "a", "a/mixed", "b/routed", "a/mixed"], known, pool)
    assert found == {"": ("autoregressive", "routed"), "a": ("routed", "mixed"), "b": ("routed",)}
    for method in ("c/mixed", "a/autoregressive", "a/trunk", "/mixed", "a/b/mixed"):
        with pytest.raises(UserError, match=f"--methods {method}: no such method"):
            rivals.measured([method], known, pool)


@pytest.mark.parametrize(
    ("changes", "draft", "said"),
    [
        ({"target": {"path": "x", "digest": "abc"}}, "", "made with another target than .*: its digest is abc, not "),
        ({"tokenizer": "abc"}, "", "made with another tokenizer than .*only pools of one tokenizer"),
        ({"draft": {"path": "gone", "digest": "abc"}}, "", "gone, the base drafter of .*pool,FOLDER"),
        ({}, "target", "is not the draft of this pool: .*pool,FOLDER"),
    ],
)
def test_a_pool_that_is_no_rival(pool, loaded, world, tmp_path, changes, draft, said):
    folder = change(shutil.copytree(pool, tmp_path / "pool"), lambda own: changes)
    place = str(getattr(world, draft)) if draft else ""
    with pytest.raises(UserError, match=f"^--rivals mine: .*{said}"):
        rivals.load([Place("mine", str(folder), place)], loaded)


def test_regret_is_against_the_oracle_and_against_the_best_of_each_task(loaded):
    """On one task the oracle is as good as the best, on the other somebody else is; each prompt emits eight tokens."""
    seconds = {"routed": [2.0, 4.0], "oracle": [1.0, 5.0], "base": [4.0, 1.0], "chosen": [0.1, 0.1]}
    request = Request(ids=(1,), max_new_tokens=8)
    asks = [Ask(Line("a", [], None, task, {}, ""), request, task, 0) for task in ("one", "two")]
    counts = Counts(8, 0, 0, 8, np.zeros(2), np.zeros(2), 0, 0)
    done = Completion([7] * 8, "length", counts, 0, 2, 0, 1.0, np.zeros(1), None)
    passes = [{name: [Result([i], [done], Seconds(own[i])) for i in (0, 1)] for name, own in seconds.items()}]
    figures = router_figures(loaded, asks, passes, ["routed", "oracle", "base"])
    assert figures["regret"] == pytest.approx(1 - (1 / 2 + 5 / 4) / 2)
    assert figures["regret_to_best"] == pytest.approx(1 - (1 / 2 + 1 / 4) / 2)
    alone = router_figures(loaded, asks, [{"routed": passes[0]["routed"]}], ["routed"])
    assert (alone["regret"], alone["regret_to_best"]) == (None, None)
