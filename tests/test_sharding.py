"""Placement changes nothing: what a mesh of eight devices says in float32 is what one device says."""

import dataclasses
import json
import re
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from decode import bench
from decode.differences import first_difference
from jaxspec import pooled, serving, sharding
from jaxspec.config import Mesh, UserError
from jaxspec.requests import Request, room_of
from jaxspec.store.curves import read_curves
from jaxspec.store.loading import load_pool
from jaxspec.store.traces import read_traces
from jaxspec.transformer import abstract, empty_cache
from tests import fleet
from train import __main__ as pipeline
from train import align, trace

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
FAST = {("sampled", (4, 2)), ("base", (8, 1)), ("base", (2, 4)), ("base", (1, 8))}
PAIRS = [
    pytest.param(name, shape, marks=() if (name, shape) in FAST else pytest.mark.slow)
    for name in fleet.CASES
    for shape in MESHES
]


def mesh_of(data: int, model: int):
    return sharding.make_mesh(data, model, jax.devices("cpu"))


@cache
def alone(name: str):
    case = fleet.CASES[name]
    return fleet.answer(case, fleet.engine(case))


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_placement_changes_no_token_and_no_count(name, shape):
    case, mesh = fleet.CASES[name], mesh_of(*shape)
    found = fleet.answer(case, fleet.engine(case, mesh), mesh)
    assert case.drafted == 0 or sum(counts.num_accepted_tokens for _, counts in alone(name)) > 0
    jax.tree.map(np.testing.assert_array_equal, found, alone(name))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 2), (8, 1)])
def test_in_bfloat16_texts_part_only_where_two_tokens_tie(pool, shape, record_property):
    """On a mesh sums run in another order; a text that parts does so where the target's two logits lie within rounding."""
    asked = [
        Request(
            ids=tuple(np.random.default_rng(i).integers(8, 300, size=6 + i % 20).tolist()), max_new_tokens=24, number=i
        )
        for i in range(64)
    ]
    texts = []
    for mesh in (None, mesh_of(*shape)):
        own = load_pool(pool, dtype="bfloat16", mesh=mesh)
        engine = pooled.speculative(own, 2, slots=8, room=room_of(32, 24), admit_rows=8)
        texts.append([done.ids for done in engine.complete(asked, serving.given(own, 8))])
    one = load_pool(pool, dtype="bfloat16")
    found = [first_difference(one, request, *both) for request, *both in zip(asked, *texts, strict=True)]
    parted = [own for own in found if own]
    record_property("share of texts that part in bfloat16", len(parted) / len(found))
    assert len(parted) < len(found) / 2
    assert all(own["gap"] is not None and own["gap"] <= 4 for own in parted)


def test_an_engine_keeps_its_states_layout_and_compiles_once(caplog):
    """From the first on: an empty state is made where it will be, in the bytes that the plan counts."""
    case, mesh = fleet.CASES["banked"], mesh_of(4, 2)
    own = fleet.engine(case, mesh)
    empty = own._empty[0](sharding.over(mesh).params(fleet.weights(case.adapters)))
    fleet.answer(case, own, mesh)
    (state,) = own._states.values()
    jax.tree.map(lambda one, other: one.sharding.is_equivalent_to(other.sharding, one.ndim) or 1 / 0, empty, state)
    keys = state.spec.target.cache.keys[0]
    assert keys.addressable_shards[0].data.shape == (2, 4, fleet.ROOM, 4)
    assert state.spec.drafter.cache.keys[0].addressable_shards[0].data.shape == (2, 2, fleet.ROOM, 4)
    with jax.log_compiles():
        fleet.answer(case, own, mesh)
    assert "Compiling" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(data=2), Mesh(model=2), Mesh(data=2, model=2)])
@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_the_stage_trains_on_a_mesh_as_it_does_on_one_device(finished, out_with, tmp_path, mesh, on_policy):
    """Also where half of the rows are the drafters' own, written and scored by models that are split."""
    spec = dataclasses.replace(finished.align, on_policy=on_policy, refresh=2)
    many, one = out_with("trace", "partition"), Path(finished.out)
    if on_policy:
        one = shutil.copytree(many, tmp_path / "one")
        align.run(dataclasses.replace(finished, out=str(one), align=spec))
    align.run(dataclasses.replace(finished, out=str(many), mesh=mesh, align=spec))
    found, expected = (read_curves(folder / "align" / "metrics.jsonl") for folder in (many, one))
    assert list(found) == list(expected)
    for course, theirs in expected.items():
        for ours, one in ((found[course], theirs), (found[course]["held"], theirs["held"])):
            assert ours["step"] == one["step"]
            np.testing.assert_allclose(ours["loss"], one["loss"], atol=2e-4)  # written to four decimals


@pytest.mark.slow
def test_the_trace_of_a_mesh_has_the_texts_of_one_device(finished, tmp_path):
    """Also where half of the texts are the log's own, which one forward pass reads."""
    with open(tmp_path / "log.jsonl", "w") as log:
        for name in sorted(Path(finished.prompts).iterdir()):
            for number, line in enumerate(name.read_text().splitlines()[:8]):
                own = json.loads(line) | ({"response": "hoist the sugar"} if number % 2 else {})
                log.write(json.dumps(own) + "\n")
    own = dataclasses.replace(finished, prompts=str(tmp_path / "log.jsonl"))
    traces = []
    for out, mesh in (("one", Mesh()), ("many", Mesh(data=4, model=2))):
        trace.run(dataclasses.replace(own, out=str(tmp_path / out), mesh=mesh))
        traces.append(read_traces(str(tmp_path / out)))
    one, many = traces
    assert [own.tolist() for own in many.tokens] == [own.tolist() for own in one.tokens]
    np.testing.assert_array_equal(many.accepted, one.accepted)
    # Sums of at most 48 terms in another order, through two layers.
    np.testing.assert_allclose(many.features["prompt"], one.features["prompt"], atol=1e-5)


@pytest.mark.slow
def test_a_bench_on_a_mesh_accepts_what_one_device_accepts(finished, world, tmp_path):
    said = []
    for mesh in (Mesh(), Mesh(data=4, model=2)):
        file = tmp_path / f"{mesh.data}.json"
        bench.run(
            bench.Bench(
                pool=f"{finished.out}/pool", prompts=str(world.prompts), limit=4, batch=4, passes=1, max_new_tokens=8,
                widths=(1,), num_speculative_tokens=2, smallest_bucket=64, json=str(file), mesh=mesh,
                methods=("mixed", "routed"),
            )
        )  # fmt: skip
        said.append(json.loads(file.read_text())["mean"])
    for name in ("mixed", "routed"):
        assert said[1][name]["equal_to_autoregressive"] == 1.0
        for figure in ("tokens", "draft_accuracy", "acceptance_by_position"):
            assert said[1][name][figure] == said[0][name][figure]


def test_rows_that_a_mesh_does_not_divide_are_refused_before_training(finished, out_with):
    with pytest.raises(UserError, match=r"--align\.rows of 2 does not divide over --mesh\.data 4; give 4$"):
        align.run(dataclasses.replace(finished, out=str(out_with("trace", "partition")), mesh=Mesh(data=4)))


def test_a_drafter_that_a_mesh_does_not_divide_is_refused_before_training(finished, out_with):
    own = dataclasses.replace(finished, out=str(out_with("trace", "partition")), mesh=Mesh(model=4))
    said = r"--mesh\.model 4 does not divide the trained drafter's 2 heads; give one of 1, 2$"
    with pytest.raises(UserError, match=said):
        align.run(own)
    with pytest.raises(UserError, match=said):  # of all stages before the first
        pipeline.run(dataclasses.replace(own, out=f"{own.out}/anew"))
    assert not Path(own.out, "anew").exists()


def test_every_leaf_of_a_transformer_is_where_its_rule_says():
    specs = sharding.param_specs(abstract(dataclasses.replace(fleet.TARGET, qkv_bias=True, qk_norm=True)))
    layer = specs["layers"][0]
    assert specs["embed"]["embedding"] == P("model", None) and specs["head"]["kernel"] == P(None, "model")
    assert all(layer["attention"][name]["kernel"] == P(None, "model") for name in "qkv")
    assert all(layer["attention"][name]["bias"] == P("model") for name in "qkv")
    assert all(layer["mlp"][name]["kernel"] == P(None, "model") for name in ("gate", "up"))
    assert layer["attention"]["o"]["kernel"] == layer["mlp"]["down"]["kernel"] == P("model", None)
    assert layer["attention"]["q_norm"]["scale"] == layer["mlp_norm"]["scale"] == specs["norm"]["scale"] == P()
    drafter = jax.tree.leaves(sharding.param_specs(abstract(fleet.DRAFT), "drafter"))
    assert all(axis is None for spec in drafter for axis in spec)


def test_a_cache_is_split_by_its_parts_rule():
    cache = empty_cache(fleet.TARGET, 8, 16)
    assert sharding.row_specs(cache, "target").keys[0] == P("data", "model", None, None)
    assert sharding.row_specs(cache).values[0] == P("data", None, None, None)


@pytest.mark.parametrize(
    ("changes", "mesh", "batch", "said"),
    [
        ({}, (1, 3), None, "--mesh.model 3 does not divide the target's 8 heads; give one of 1, 2, 4, 8"),
        ({"num_kv_heads": 2}, (1, 4), None, "--mesh.model 4 does not divide the target's 2 kv heads; give one of 1, 2"),
        ({"mlp_width": 60}, (1, 8), None, "does not divide the target's 60 mlp; give one of 1, 2, 4"),
        ({"vocab_size": 65}, (1, 2), None, "does not divide the target's 65 vocab; give one of 1"),
        ({}, (4, 1), 6, "a batch of 6 does not divide over --mesh.data 4; give 4 or 8"),
        ({}, (4, 1), 2, "a batch of 2 does not divide over --mesh.data 4; give 4"),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused_with_what_works(changes, mesh, batch, said):
    with pytest.raises(UserError, match=re.escape(said) + "$"):
        sharding.check(dataclasses.replace(fleet.TARGET, **changes), sharding.abstract_mesh(*mesh), batch)


def test_a_mesh_that_is_too_large_is_refused():
    with pytest.raises(UserError, match="data=4 x model=4 needs 16 devices, 8 are there"):
        mesh_of(4, 4)
