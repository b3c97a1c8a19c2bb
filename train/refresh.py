"""Trains a pool's router again on what traffic has shown, without the target and without the old prompts.

    python -m decode.generate --pool runs/mine/pool --input IN --output out.jsonl --online --replay 2048
    python -m train.refresh   --pool runs/mine/pool --replay out.jsonl.replay.npz --out runs/later

The job has kept features of the prompts that it served, and whom the target agreed with; the pool keeps features of prompts
of every task. The router goes on from where it was, on both, so that new wordings find their drafter and old ones keep it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import replay, router, shift
from jaxspec.config import UserError, command_line
from jaxspec.replay import Known, Served
from jaxspec.router import RouterParams
from jaxspec.store.facts import find_pool
from jaxspec.store.names import NORMAL, REPLAY, ROUTER, drafter_names
from jaxspec.store.stages import CLAIM, MANIFEST, copy_files, digest_of, finish, open_stage, read_arrays, write_arrays
from jaxspec.store.trees import read_tree, write_tree

KEPT = (NORMAL, REPLAY, ROUTER, MANIFEST, CLAIM)  # files that the new pool has of its own


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Which pool learns from what."""

    pool: str
    """Folder of the pool."""
    replay: tuple[str, ...]
    """Files OUT.replay.npz that `decode.generate --online --replay` has written with this pool."""
    out: str
    """Folder for the refreshed pool, which is OUT/pool."""
    steps: int = 600
    """Optimiser steps."""
    batch: int = 256
    """Prompts in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of the order of training."""
    mixup: float = 0.0
    """Share of the steps that train on mixtures of two prompts' features and tasks."""


class Refreshed(NamedTuple):
    """The router, what it knows its tasks by, and what is normal then."""

    params: RouterParams
    known: Known
    normal: shift.Normal


def run(config: Refresh) -> None:
    """Writes `out/pool`: the pool with another router."""
    folder, facts, digest = find_pool(config.pool)
    if not (folder / REPLAY).exists():
        raise UserError(
            f"{config.pool} has no {REPLAY}: it was made by an earlier version; remove it and run `python -m train.calibrate` "
            "again"
        )
    old = Known(**read_arrays(folder / REPLAY))
    files = [_served(file, facts, old) for file in config.replay]
    settings = {name: getattr(config, name) for name in ("steps", "batch", "learning_rate", "seed", "mixup")}
    parents = {"pool": digest, "replay": digest_of([zlib.crc32(Path(file).read_bytes()) for file in config.replay])}
    stage = open_stage(config.out, "pool", config={"refresh": settings}, parents=parents)
    if stage.complete:
        return print(f"refresh: complete in {stage.folder}")
    tasks, width = len(facts["tasks"]), old.features.shape[1]
    before = read_tree(folder / ROUTER, router.abstract(width, facts["router_hidden"], tasks))
    served = replay.bounded(files, sum(len(own.name) for own in files))
    after = refreshed(before, old, served, **settings)
    copy_files(folder, stage.folder, KEPT)
    write_tree(stage.folder / ROUTER, after.params)
    write_arrays(stage.folder / REPLAY, after.known._asdict())
    write_arrays(stage.folder / NORMAL, after.normal._asdict())
    finish(stage, **facts)
    _say(facts, before, after, served)
    print(f"refresh: pool in {stage.folder}")


def refreshed(
    params: RouterParams,
    old: Known,
    served: Served,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    mixup: float = 0.0,
) -> Refreshed:
    """Goes on training the router on the known and the served prompts; a part of each is held out to tell what is normal."""
    tasks = params.mlp["outer"]["kernel"].shape[1]
    known = replay.bounded_by_task([old, replay.labelled(served, tasks, int(old.refresh.max()) + 1)])
    train = ~replay.held_out(known)
    settings = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed, "mixup": mixup}
    params = router.train(params, known.features[train], known.task[train], **settings)
    return Refreshed(params, known, replay.normal(params, known, _probabilities(params, known.features).max(-1)))


def _probabilities(params: RouterParams, features: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(router.probabilities)(params, jnp.asarray(features)))


def _served(file: str, facts: dict, old: Known) -> Served:
    """What a job with this pool, or with one of the same drafters, has kept."""
    arrays = read_arrays(Path(file))
    if arrays.keys() != set(Served._fields):
        raise UserError(f"--replay {file} is not of `decode.generate --replay`; give its OUT.replay.npz")
    served, wanted = Served(**arrays), (len(facts["tasks"]) + 2, old.features.shape[1])
    found = served.agreement.shape[1], served.features.shape[1]
    if found != wanted:
        raise UserError(
            f"--replay {file} is of another pool: drafters and features number {found}, here {wanted}; give a file that a job "
            "with this pool has written"
        )
    return served


def _say(facts: dict, before: RouterParams, after: Refreshed, served: Served) -> None:
    """How prompts that were not trained on are routed, before and after, and which of the served change their task."""
    judged, new = replay.held_out(after.known), np.isin(after.known.name, served.name)
    for name, rows in (("served", judged & new), ("known before", judged & ~new)):
        right = [
            np.mean(_probabilities(params, after.known.features[rows]).argmax(-1) == after.known.task[rows])
            for params in (before, after.params)
        ]
        if rows.any():
            print(f"refresh: {rows.sum()} prompts {name}: {right[0]:.3f} to their task, {right[1]:.3f} from now on")
    names, task = drafter_names(facts), _probabilities(after.params, served.features).argmax(-1)
    for old, own in sorted({*zip(served.task.tolist(), task.tolist(), strict=True)}):
        rows = (served.task == old) & (task == own)
        accuracy = served.accepted[rows].sum() / max(served.drafted[rows].sum(), 1)
        if old != own:
            said = f"{rows.sum()} served prompts move from {names[old]} to {names[own]}"
            print(f"refresh: {said}; of their drafts {accuracy:.3f} were accepted")


if __name__ == "__main__":
    command_line(Refresh, run)
