"""Rows that are decoded together draft as many tokens as pay for so many rows, and none where speculation cannot win."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import jaxspec
from decode import generate
from jaxspec.store.facts import draft_length, find_pool
from jaxspec.store.loading import load_pool
from train import calibrate


def losing_together(facts: dict) -> dict:
    """The facts, had speculation paid in one slot and lost in two and in eight."""
    table = lambda best: {
        str(k): {"tokens_per_second": 9.0 if k == best else 1.0, "round_milliseconds": 1.0} for k in (0, 1, 2)
    }
    return {**facts, "calibration_by_slots": {"1": table(2), "2": table(0), "8": table(1)}}


def test_a_job_takes_the_least_measured_number_of_slots_that_is_no_less_than_its_own(loaded):
    facts = losing_together(loaded.facts)
    assert [draft_length(facts, slots=own) for own in (1, 2, 3, 8, 64)] == [2, 0, 1, 1, 1]
    assert (
        draft_length(facts) == 2 and draft_length(facts, 4, slots=2) == 4 and draft_length(facts, least=1, slots=2) > 0
    )


@pytest.mark.parametrize("by_slots", [{}, {"calibration_by_slots": {}}, None], ids=["alone", "empty", "twice"])
def test_pools_of_earlier_versions_say_their_rounds_alike(pool, tmp_path, by_slots):
    """They said the rounds in the fewest slots under a name of their own, and the oldest nothing else."""
    shutil.copytree(pool, tmp_path / "pool")
    now = losing_together(find_pool(pool)[1])
    earlier = {"calibration": now["calibration_by_slots"]["1"], **now}
    if by_slots is not None:
        del earlier["calibration_by_slots"]
    rewrite(tmp_path / "pool", lambda own: {**earlier, **(by_slots or {})})
    facts = load_pool(str(tmp_path / "pool")).facts
    assert facts == {**now, **({} if by_slots is None else {"calibration_by_slots": {"1": earlier["calibration"]}})}
    assert [draft_length(facts, slots=own) for own in (1, 2)] == ([2, 0] if by_slots is None else [2, 2])


def rewrite(folder: Path, change) -> None:
    """Has a pool's manifest say what `change` makes of its facts."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["results"] = change(manifest["results"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_job_drafts_where_it_pays_and_not_where_it_cannot_win(pool, loaded, world, tmp_path):
    own = tmp_path / "pool"
    shutil.copytree(pool, own)
    rewrite(own, losing_together)
    line = (world.prompts / "kitchen.jsonl").read_text().splitlines()[0]
    (tmp_path / "in.jsonl").write_text(line + "\n")
    drafted = {}
    for batch in (1, 2):
        out = tmp_path / f"{batch}.jsonl"
        shared = {"pool": str(own), "input": str(tmp_path / "in.jsonl"), "output": str(out), "max_new_tokens": 6}
        generate.run(generate.Generate(**shared, batch=batch))
        drafted[batch] = json.loads(out.read_text())["num_draft_tokens"]
    assert drafted[1] > 0 == drafted[2]
    known = dataclasses.replace(loaded, facts=losing_together(loaded.facts))
    (answer,) = jaxspec.generate(known, [json.loads(line)["prompt"]], batch=2, max_new_tokens=6)
    assert answer.num_draft_tokens == 0


def test_calibration_measures_every_number_of_slots(finished, out_with, capsys):
    out = out_with("trace", "partition", "align", "router")
    spec = dataclasses.replace(finished.calibrate, slots=(2, 1), lengths=(1,))
    calibrate.run(dataclasses.replace(finished, out=str(out), calibrate=spec))
    results = json.loads(Path(out, "pool", "manifest.json").read_text())["results"]
    by_slots = results["calibration_by_slots"]
    assert list(by_slots) == ["1", "2"] and "calibration" not in results
    assert all(row["tokens_per_second"] > 0 for table in by_slots.values() for row in table.values())
    assert "in 2 slots" in capsys.readouterr().out
