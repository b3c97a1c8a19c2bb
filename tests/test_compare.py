"""Ways of aligning side by side: what is measured of a drafter that knows the answer, what is kept, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxspec.config import Comparison, Mesh, UserError, load_preset
from train import align, compare

CELLS = ["forward_kl, target", "forward_kl, on-policy", "negative_log_likelihood, target"]


@pytest.fixture(scope="module")
def comparison(experiment, world, tmp_path_factory) -> Comparison:
    """Two tasks are trained on, the third is outside; the base is the target itself."""
    known = {own.name: getattr(experiment, own.name) for own in dataclasses.fields(experiment)}
    known |= {"out": str(tmp_path_factory.mktemp("comparison")), "include": ("kitchen", "sailing")}
    known |= {
        "draft": str(world.target),
        "align": dataclasses.replace(experiment.align, trunk=0.0, refresh=2, full_learning_rates=(0.1,)),
    }
    ways = {"divergences": ("forward_kl", "negative_log_likelihood"), "sources": ("target", "on-policy")}
    return Comparison(**known, **ways, drafted=(2,), outside=("algebra",), measured=3, slots=4)


@pytest.fixture(scope="module")
def said(comparison) -> dict:
    compare.run(comparison)
    return json.loads(Path(comparison.out, "comparison.json").read_text())


def test_a_base_that_is_the_target_loses_nothing_and_costs_what_the_target_does(said):
    assert list(said["rows"]) == ["base", *CELLS]
    for way in ("K = 2, T = 0", "K = 2, T = 1"):
        for task, own in said["rows"]["base"][way]["tasks"].items():
            assert own["draft_accuracy"] == 1.0, task
            assert 2.0 < own["block_efficiency"] <= 3.0, task
            assert own["memory_bound_speedup"] == pytest.approx(own["block_efficiency"] / 3)  # c = 1, K = 2


def test_the_mean_is_that_of_the_tasks_trained_on(said):
    for row in said["rows"].values():
        own = row["K = 2, T = 0"]
        assert set(own["tasks"]) == {"kitchen", "sailing", "algebra"}
        inside = [own["tasks"][task]["block_efficiency"] for task in ("kitchen", "sailing")]
        assert own["mean"]["block_efficiency"] == pytest.approx(sum(inside) / 2)


def test_every_cell_is_a_drafter_of_its_own(said):
    rates = [said["rows"][name]["K = 2, T = 1"]["mean"]["draft_accuracy"] for name in CELLS]
    assert len(set(rates)) == len(CELLS) and max(rates) < 1.0


def test_finished_cells_are_not_trained_again(said, comparison, monkeypatch):
    monkeypatch.delattr(align, "trained")
    compare.run(comparison)
    again = json.loads(Path(comparison.out, "comparison.json").read_text())
    figures = lambda own: [way["tasks"] for name in CELLS for way in own["rows"][name].values()]
    assert figures(again) == figures(said)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"outside": ("kitchen",)}, "--outside kitchen: cells train on that"),
        ({"include": ()}, "--outside algebra: cells train on that"),
        ({"outside": ("nowhere",)}, "nowhere"),
        ({"slots": 3, "mesh": Mesh(data=2)}, "--slots"),
        ({"drafted": (0,)}, "--drafted 0 drafts nothing"),
        ({"drafted": (99,)}, "num_speculative_tokens 99 will not do"),
    ],
)
def test_a_comparison_that_says_nothing_is_refused(comparison, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        compare.run(dataclasses.replace(comparison, **changes))


def test_the_presets_that_reproduce_papers_can_be_read():
    for name in ("distillspec", "direct_alignment"):
        own = load_preset(f"configs/{name}.py")
        assert isinstance(own, Comparison) and own.outside and not set(own.outside) & set(own.include)


@pytest.mark.slow
def test_on_a_mesh_drafters_are_trained_and_measured_as_on_one_device(comparison, world, tmp_path):
    """From a base with something to learn: gradients of one that is the target are the rounding of their sums."""
    gentle = dataclasses.replace(comparison.align, full_learning_rates=(1e-3,))
    once = {"draft": str(world.draft), "sources": ("target",), "divergences": ("forward_kl",), "align": gentle}
    found = []
    for data in (1, 2):
        compare.run(dataclasses.replace(comparison, **once, out=str(tmp_path / str(data)), mesh=Mesh(data=data)))
        rows = json.loads((tmp_path / str(data) / "comparison.json").read_text())["rows"]
        found.append([rows[name]["K = 2, T = 0"]["tasks"] for name in ("base", CELLS[0])])
    assert found[0] == found[1]
