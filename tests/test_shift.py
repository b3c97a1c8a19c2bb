"""Prompts that no task explains are found, counted and kept; a normal job is left alone."""

import dataclasses
import functools
import json
import random
import shutil

import numpy as np
import pytest

from decode import generate
from decode.generate import Generate
from jaxspec import pooled, shift
from jaxspec.config import UserError
from jaxspec.store.loading import load_pool
from jaxspec.store.names import NORMAL
from jaxspec.store.prompts import read_prompts
from jaxspec.store.stages import write_arrays

GARDEN = "water these seedling tulip spade compost moss hedge beneath mulch rake fern trellis"


@pytest.fixture(scope="module")
def in_memory(loaded):
    """Jobs take the pool that was read already, and the engine that an equal job has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooled, "speculative", functools.cache(pooled.speculative))
        patch.setattr(generate, "load_pool", lambda *paths, **places: loaded)
        yield


@pytest.fixture
def job(in_memory, pool, world, tmp_path):
    """`job(unseen, known)`: answers so many prompts of a task that is not in the pool's log, and of those that are."""
    draw = random.Random(5)
    fresh = [" ".join(draw.choices(GARDEN.split(), k=draw.randint(4, 8))) for _ in range(40)]
    lines = [{"id": f"garden-{i}", "prompt": text} for i, text in enumerate(fresh)]
    old = [json.loads(line) for file in sorted(world.prompts.iterdir()) for line in file.read_text().splitlines()]

    def answer(unseen, known, name="out.jsonl"):
        own = [*old[:: len(old) // known if known else 1][:known], *lines[:unseen]]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
        out = tmp_path / name
        shape = {"batch": 4, "max_new_tokens": 2, "num_speculative_tokens": 2}
        generate.run(Generate(pool=pool, input=str(tmp_path / "in.jsonl"), output=str(out), **shape))
        return out.with_name(f"{name}.unexplained.jsonl")

    return answer


def test_a_task_that_was_never_seen_is_told_of_and_kept_as_prompts(job, capsys):
    kept = job(unseen=30, known=15)
    said = next(line for line in capsys.readouterr().err.splitlines() if "resemble" in line)
    number, prompts = int(said.split()[1]), int(said.split()[3])
    assert prompts == 45 and 18 <= number <= 36 and "garden-" in said and str(kept) in said
    found = read_prompts(str(kept))
    assert sum(line.id.startswith("garden") for line in found) > 0.8 * number and len(found) == number
    assert all(line.messages[0]["role"] == "user" and line.text for line in found)


def test_a_job_of_the_tasks_that_are_known_says_nothing(job, capsys):
    assert not job(unseen=0, known=45).exists()
    assert "resemble" not in capsys.readouterr().err


def test_a_pool_that_does_not_say_what_is_normal_is_served_without_a_word(job, monkeypatch, capsys, loaded):
    assert loaded.normal is not None
    monkeypatch.setattr(generate, "load_pool", lambda *paths, **places: dataclasses.replace(loaded, normal=None))
    assert not job(unseen=30, known=3).exists()
    assert "resemble" not in capsys.readouterr().err


def test_what_is_kept_is_bounded_and_does_not_depend_on_the_order():
    names = [f"prompt {i}" for i in range(1000)]
    once = shift.kept(names, 50)
    assert len(once) == 50 and shift.kept(reversed(names), 50) == once
    in_parts = shift.kept([*shift.kept(names[:300], 50), *names[300:]], 50)
    assert in_parts == once and len({name[:8] for name in once}) > 5  # of all of them, not of the first


def test_few_strange_prompts_are_normal():
    assert not shift.unexplained(9, 20) and not shift.unexplained(10, 1000) and not shift.unexplained(40, 1000)
    assert shift.unexplained(10, 200) and shift.unexplained(41, 1000)


def test_the_share_of_normal_prompts_that_are_strange_is_what_was_asked_for():
    """Clusters in eight dimensions: one in a hundred by each of two thresholds, and nearly all of a cluster elsewhere.

    The first cluster is three times as wide as the others, and its limit is none of theirs.
    """
    draw, centres = np.random.default_rng(0), 12 * np.eye(8)
    task = draw.integers(0, 5, 4000)
    of = lambda task: centres[task] + np.where(task == 0, 3, 1)[:, None] * draw.normal(size=(len(task), 8))
    sure = draw.uniform(0.5, 1.0, 4000)
    known = shift.normal(of(task), task, of(task), task, sure)
    alike = shift.strange(known, of(task), task, draw.uniform(0.5, 1.0, 4000))
    assert all(0.005 <= alike[task == own].mean() <= 0.045 for own in range(5))
    assert shift.strange(known, of(np.full(100, 7)), np.full(100, 1), np.ones(100)).mean() > 0.95
    assert shift.far(
        known, of(np.full(100, 1)), np.full(100, 2)
    ).all()  # near a task, but not the one that it is taken for
    assert shift.strange(known, of(task), task, np.zeros(4000)).all()


def test_few_prompts_say_what_is_normal_by_their_spread():
    draw, task = np.random.default_rng(0), np.repeat(np.arange(2), 400)
    of = lambda task: 9 * task[:, None] + draw.normal(size=(len(task), 6))
    few = np.repeat(np.arange(2), 20)
    known = shift.normal(of(task), task, of(few), few, np.ones(40))
    assert 0.001 <= shift.far(known, of(task), task).mean() <= 0.06


def test_a_direction_in_which_no_prompt_ever_went_is_told_where_features_are_many():
    """Only AXES directions have a variance of their own; the new prompts differ in one of the others alone."""
    draw, task = np.random.default_rng(0), np.zeros(600, int)
    features = np.pad(draw.normal(size=(600, shift.AXES + 8)), ((0, 0), (0, 64)))
    known = shift.normal(features, task, features, task, np.ones(600))
    assert known.axes.shape == (shift.AXES + 72, shift.AXES)
    assert not shift.far(known, features, task).all()
    assert shift.far(known, features + 2.0 * (np.arange(features.shape[1]) >= shift.AXES + 8), task).all()


def test_an_account_of_what_is_normal_that_lacks_a_part_is_told_with_the_remedy(pool, tmp_path):
    folder = tmp_path / "pool"
    shutil.copytree(pool, folder)
    write_arrays(folder / NORMAL, {"centres": np.zeros((3, 4))})
    with pytest.raises(UserError, match=r"normal.npz is damaged \(it lacks axes, .*\); remove it, .* train.calibrate"):
        load_pool(str(folder))
