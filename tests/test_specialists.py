"""Specialists that are full fine-tunes: chosen by the calibrate split, and served, exported and merged like adapters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from decode import export
from jaxspec import pooled, serving
from jaxspec.adapters import Whole
from jaxspec.config import UserError
from jaxspec.requests import Request, room_of
from jaxspec.store.loading import load_pool
from jaxspec.store.stages import manifest
from train import align, calibrate, extras, router


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory):
    """The experiment with specialists of both kinds, the full ones trained at a rate that no adapter can follow."""
    out = tmp_path_factory.mktemp("specialists")
    for name in ("trace", "partition"):
        (out / name).symlink_to(Path(finished.out, name))
    rates = {"learning_rates": (1e-6,), "full_learning_rates": (1e-3,)}
    spec = dataclasses.replace(finished.align, specialists=("lora", "full"), trunk=0.0, steps=8, **rates)
    own = dataclasses.replace(finished, out=str(out), align=spec)
    for stage in (align, router, calibrate):
        stage.run(own)
    return own


def test_the_better_kind_is_kept(made):
    said = manifest(made.out, "align")["results"]
    assert said["bank"] == "bank_full" and said["bank_full"]["agreement"] > said["bank_lora"]["agreement"]
    assert said["bank_full"]["steps"] == said["bank_lora"]["steps"]
    pool = load_pool(str(Path(made.out, "pool")))
    assert isinstance(pool.bank, Whole) and len(pool.tasks) == 3
    of = lambda name: pool.drafter(name)["embed"]["embedding"]
    assert all((np.asarray(of(name)) != np.asarray(of("base"))).any() for name in pool.tasks)


def test_rows_of_several_slots_draft_with_their_own_weights(made):
    pool = load_pool(str(Path(made.out, "pool")))
    ids = [tuple(np.random.default_rng(i).integers(8, 64, size=3 + i).tolist()) for i in range(6)]
    requests = [Request(ids=own, max_new_tokens=10, number=i, route=i % 4 - 1) for i, own in enumerate(ids)]
    said = {}
    for slots in (1, 4):
        engine = pooled.speculative(pool, 2, slots=slots, room=room_of(32, 10))
        done = engine.complete(requests, serving.given(pool, slots))
        said[slots] = [(own.ids, own.counts.accepted_by_position.tolist()) for own in done]
    assert said[1] == said[4]


def test_they_are_exported_whole_and_not_as_adapters(made, tmp_path):
    pool = str(Path(made.out, "pool"))
    with pytest.raises(UserError, match=r"full fine-tunes .* --to hf"):
        export.run(export.Export(pool=pool, to="peft", out=str(tmp_path / "peft")))
    export.run(export.Export(pool=pool, to="hf", out=str(tmp_path / "hf"), drafters=("task 1",)))
    assert (tmp_path / "hf" / "task-1" / "model.safetensors").exists()


def test_they_are_merged_with_their_embeddings(made):
    extras.run(made)
    pool = load_pool(str(Path(made.out, "pool")))
    mean = jax.tree.map(lambda leaf: np.asarray(leaf).mean(0), pool.bank.weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), pool.drafter("merged-average"), mean)


def test_a_trunk_that_takes_all_steps_is_refused(finished, out_with):
    spec = dataclasses.replace(finished.align, trunk=0.99)
    with pytest.raises(UserError, match=r"--align.trunk 0.99 leaves the specialists no step of 4"):
        align.run(dataclasses.replace(finished, out=str(out_with("trace", "partition")), align=spec))
