"""A pool that was carried elsewhere is calibrated there by what it keeps, and says so where it was not."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from decode import bench, generate
from jaxspec.config import Experiment, UserError
from jaxspec.store.facts import calibration, draft_length, find_pool
from jaxspec.store.loading import load_pool
from jaxspec.store.recalibration import SAMPLE, read_sample
from jaxspec.store.stages import copy_files, read_arrays
from jaxspec.store.traces import read_traces
from tests.test_rivals import change
from train import __main__ as pipeline
from train import calibrate


@pytest.fixture(scope="module")
def carried(pool, world, tmp_path_factory) -> tuple[Path, Path]:
    """A copy of the pool that knows no place of its target and nothing of this device, and where the target is now."""
    folder = tmp_path_factory.mktemp("carried")
    shutil.copytree(pool, folder / "pool")
    shutil.copytree(world.target, folder / "target")
    gone = lambda own: {"target": own["target"] | {"path": "/nowhere"}}
    other = {"calibrated": {"device": {"platform": "tpu", "kind": "TPU v9", "number": 4}, "temperature": 0.0}}
    return change(folder / "pool", lambda own: gone(own) | other), folder / "target"


@pytest.fixture(scope="module")
def here(carried, experiment, tmp_path_factory) -> Path:
    """The carried pool, calibrated for temperature 1 and in two numbers of slots by nothing but its folder."""
    folder, target = carried
    spec = dataclasses.replace(experiment.calibrate, temperature=1.0, lengths=(1,), slots=(1, 2), further=("ngram",))
    out = tmp_path_factory.mktemp("here")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    again = Experiment(pool=str(folder), target=str(target), out=str(out), calibrate=spec)
    calibrate.run(again)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}
    calibrate.run(again)  # complete: skipped
    return out / "pool"


def test_a_pool_keeps_the_texts_that_it_was_calibrated_by(pool, finished):
    sample, traces = read_sample(Path(pool)), read_traces(finished.out)
    partition = read_arrays(Path(finished.out, "partition", "partition.npz"))
    assert sample.number.tolist() == np.flatnonzero(partition["split"] == 1).tolist()
    assert sample.task.tolist() == partition["task"][sample.number].tolist() and sample.tasks == 3
    for row, i in enumerate(sample.number):
        tokens, begin = traces.tokens[i], traces.prompt_length[i]
        assert sample.texts.tokens[row].tolist() == tokens.tolist() and sample.texts.prompt_length[row] == begin
        best = traces.top_ids[i, : len(tokens) - begin, 0]
        assert sample.texts.top_ids[row, : len(best), 0].tolist() == best.tolist()
    assert (Path(pool) / SAMPLE).stat().st_size < 20 * sum(map(len, sample.texts.tokens)) + 4096


def test_what_was_accepted_is_the_same_of_the_texts_that_are_kept(pool, carried, experiment, tmp_path):
    folder, target = carried
    spec = dataclasses.replace(experiment.calibrate, lengths=(1,))
    calibrate.run(Experiment(pool=str(folder), target=str(target), out=str(tmp_path), calibrate=spec))
    was, facts = find_pool(pool)[1], find_pool(str(tmp_path / "pool"))[1]
    assert facts["acceptance_length"] == was["acceptance_length"]
    assert facts["calibrated"]["device"]["kind"] == jax.devices()[0].device_kind
    assert facts["target"]["path"] == str(target.resolve())
    new = {"calibration_by_slots", "calibrated", "target"}
    assert {name: facts[name] for name in facts if name not in new} == {
        name: was[name] for name in was if name not in new
    }
    files = {file.name for file in Path(pool).iterdir()}
    assert {file.name for file in (tmp_path / "pool").iterdir()} == files
    same = [name for name in files if (tmp_path / "pool" / name).read_bytes() == Path(pool, name).read_bytes()]
    assert files - {*same} == {"manifest.json", "claim.json"}


def test_a_pool_that_is_calibrated_for_a_temperature_says_so_and_serves_others_too(here, pool):
    facts, was = find_pool(str(here))[1], find_pool(pool)[1]
    assert facts["calibrated"]["temperature"] == 1.0 and was["calibrated"]["temperature"] == 0.0
    assert list(facts["calibration_by_slots"]) == ["1", "2"] and facts["further"]["ngram"]["calibration"]
    assert facts["acceptance_length"].keys() == was["acceptance_length"].keys() and len(facts["labels"]) == 3
    for name, own in facts["acceptance_length"].items():
        for row, greedy in zip(own, was["acceptance_length"][name], strict=True):
            assert (row is None) == (greedy is None) and (row is None or row != greedy)
            assert row is None or all(1 <= few <= more <= k + 1 for k, few, more in zip(range(1, 17), row, row[1:]))
    assert draft_length(facts) == 1
    assert load_pool(str(here)).names == load_pool(pool).names


def test_a_pool_can_be_calibrated_for_another_dtype_which_jobs_then_have(pool, finished, tmp_path, monkeypatch):
    seen = []

    def measured(experiment, own, *rest):
        seen.append({str(leaf.dtype) for leaf in jax.tree.leaves(own.pair.target.params)})
        return {"calibration_by_slots": {1: calibration(own.facts)}, "further": {}}

    monkeypatch.setattr(calibrate, "_measured", measured)
    spec = dataclasses.replace(finished.calibrate, dtype="bfloat16")
    calibrate.run(dataclasses.replace(finished, pool=pool, out=str(tmp_path), calibrate=spec))
    assert find_pool(pool)[1]["dtype"] == "float32" and find_pool(str(tmp_path / "pool"))[1]["dtype"] == "bfloat16"
    assert seen == [{"bfloat16"}]


@pytest.mark.parametrize("command", [calibrate.run, pipeline.run])
def test_a_new_pools_dtype_is_said_elsewhere(finished, tmp_path, command):
    spec = dataclasses.replace(finished.calibrate, dtype="bfloat16")
    with pytest.raises(UserError, match=r"--calibrate\.dtype bfloat16 is for a finished pool"):
        command(dataclasses.replace(finished, out=str(tmp_path), calibrate=spec))
    assert not any(tmp_path.iterdir())


def test_a_job_on_another_device_says_once_how_to_calibrate_there(carried, here, world, tmp_path, capsys):
    folder, target = carried
    lines = (world.prompts / "kitchen.jsonl").read_text().splitlines()[:3]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")

    def told(pool: Path, name: str, **settings) -> list[str]:
        job = {"pool": str(pool), "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / name), "batch": 2}
        generate.run(generate.Generate(**job, target=str(target), max_new_tokens=4, **settings))
        assert len((tmp_path / name).read_text().splitlines()) == 3
        return [line for line in capsys.readouterr().err.splitlines() if "was calibrated on" in line]

    (said,) = told(folder, "there.jsonl")
    assert "TPU v9 (tpu)" in said and f"python -m train.calibrate --pool {folder} --out" in said
    assert told(here, "here.jsonl") == told(folder, "asked.jsonl", num_speculative_tokens=1) == []


def test_bench_says_it_too(carried, here, capsys):
    folder, target = carried
    shared = {"target": str(target), "methods": ("base",), "limit": 1, "max_new_tokens": 4, "widths": (1,), "passes": 1}
    for pool, times in ((folder, 1), (here, 0)):
        bench.prepare(bench.Bench(pool=str(pool), **shared))
        assert capsys.readouterr().out.count("was calibrated on TPU v9 (tpu)") == times


def test_pools_that_do_not_say_where_they_were_calibrated_are_taken_by_their_manifest(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    manifest = json.loads((tmp_path / "pool" / "manifest.json").read_text())
    del manifest["results"]["calibrated"]
    (tmp_path / "pool" / "manifest.json").write_text(json.dumps(manifest))
    assert find_pool(str(tmp_path / "pool"))[1]["calibrated"] == {"device": manifest["device"], "temperature": 0.0}
    manifest["config"] = {"refresh": {}}  # of a device that had nothing to do with calibration
    (tmp_path / "pool" / "manifest.json").write_text(json.dumps(manifest))
    assert find_pool(str(tmp_path / "pool"))[1]["calibrated"]["device"] is None


def test_a_copy_holds_what_there_is_now_and_spares_what_is_its_own(tmp_path):
    """A drafter that was taken away while a copy was cut off is in it no more."""
    old, new = tmp_path / "old", tmp_path / "new"
    for file in ("bank", "gone", "feature/plain/weights", "manifest.json", ".torn.part"):
        (old / file).parent.mkdir(parents=True, exist_ok=True)
        (old / file).write_text(f"old {file}")
    new.mkdir()
    (new / "manifest.json").write_text("own")
    copy_files(old, new, ("manifest.json",))
    (old / "gone").unlink()
    copy_files(old, new, ("manifest.json",))
    found = {str(file.relative_to(new)): file.read_text() for file in new.rglob("*") if file.is_file()}
    own = {name: f"old {name}" for name in ("bank", "feature/plain/weights")}
    assert found == own | {"manifest.json": "own"}


def test_what_cannot_be_calibrated_again_says_what_can(pool, here, finished, tmp_path):
    shutil.copytree(pool, tmp_path / "old")
    (tmp_path / "old" / SAMPLE).unlink()
    with pytest.raises(
        UserError, match=r"earlier version and has no sample.npz .*; move it away and run `python -m train.calibrate`"
    ):
        calibrate.run(Experiment(pool=str(tmp_path / "old"), out=str(tmp_path / "out")))
    (tmp_path / "old" / SAMPLE).write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"sample.npz is damaged"):
        calibrate.run(Experiment(pool=str(tmp_path / "old"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"belongs to another experiment: .* choose another --out"):
        calibrate.run(Experiment(pool=pool, out=str(here.parent)))
    with pytest.raises(UserError, match=r"--pool is for train.calibrate alone"):
        pipeline.run(dataclasses.replace(finished, pool=pool))
