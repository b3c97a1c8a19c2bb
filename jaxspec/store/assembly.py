"""A pool put together from the stages that made its parts: its files, and what its manifest says of them."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec import router, sharding, shift
from jaxspec.config import Experiment
from jaxspec.replay import Known, bounded_by_task
from jaxspec.store.curves import read_curves
from jaxspec.store.loading import known_pool
from jaxspec.store.models import read_pair
from jaxspec.store.names import BANK, MIXED, NORMAL, POINTS, REPLAY, ROUTER, TEST, TRUNK_FILE
from jaxspec.store.pool import Pool
from jaxspec.store.stages import manifest, write_arrays, write_whole
from jaxspec.store.traces import Traces


def assembled(experiment: Experiment, folder: Path, traces: Traces, partition: dict) -> Pool:
    """Writes what finished stages made into the folder, what is normal and what the router remembers; not yet calibrated."""
    facts = _facts(experiment, traces, partition)
    _gather(experiment, folder, traces, partition)
    pool = known_pool(folder, facts, digest="not yet calibrated", mesh=sharding.asked(experiment.mesh))
    write_arrays(folder / NORMAL, _normal(pool, traces.features["prompt"], partition)._asdict())
    write_arrays(folder / REPLAY, _replay(traces, partition)._asdict())
    return pool


def _facts(experiment: Experiment, traces: Traces, partition: dict) -> dict:
    """What the pool's manifest says; all of it is needed to decode with the pool elsewhere."""
    pair = read_pair(experiment.target, experiment.draft, experiment.dtype, sharding.asked(experiment.mesh))
    tasks = len(partition["centroids"])
    align = manifest(experiment.out, "align")
    bank = align["results"]["bank"]
    model = lambda own: {"path": str(Path(own.path).resolve()), "digest": own.digest}
    return {
        "target": model(pair.target),
        "draft": model(pair.draft),
        "tokenizer": pair.fingerprint,
        "dtype": experiment.dtype,
        "tasks": [f"task {t}" for t in range(tasks)],
        "labels": _labels(traces, partition, tasks),
        "sizes": np.bincount(partition["task"], minlength=tasks).tolist(),
        "include": list(experiment.include),
        "rank": experiment.align.rank,
        "specialists": bank if isinstance(bank, str) else "bank_lora",  # the adapters' figures, in earlier versions
        "mixed": align["results"]["mixed"],
        "trunk": "trunk" in align["results"],
        "trained": _trained(align["results"]),
        "training": {name: align["config"]["align"][name] for name in ("steps", "trunk", "divergence")},
        "router_hidden": experiment.router.hidden,
        "fallback_below": experiment.router.fallback_below,
        "max_new_tokens": experiment.trace.max_new_tokens,
        "max_prompt_tokens": experiment.trace.max_prompt_tokens,
        "curves": read_curves(Path(experiment.out, "align", "metrics.jsonl")),
        "added": {},
    }


def _gather(experiment: Experiment, folder: Path, traces: Traces, partition: dict) -> None:
    """Copies the parts, and writes the test split and a map of the prompts."""
    trunk = [("align", TRUNK_FILE)] if "trunk" in manifest(experiment.out, "align")["results"] else []
    for parent, name in (("align", BANK), ("align", MIXED), *trunk, ("router", ROUTER)):
        source = Path(experiment.out, parent, name)
        write_whole(folder / name, lambda part, source=source: shutil.copyfile(source, part))
    test = [
        json.dumps({**line, "cluster": int(task)})
        for line, task, split in zip(traces.log, partition["task"], partition["split"], strict=True)
        if split == 2
    ]
    write_whole(folder / TEST, lambda part: part.write_text("\n".join(test) + "\n", encoding="utf-8"))
    rows = np.random.default_rng(experiment.seed).permutation(len(traces.log))[:1000]
    centred = traces.features["prompt"] - traces.features["prompt"].mean(0)
    axes = np.linalg.svd(centred[rows], full_matrices=False)[2][:2]
    labels = np.array([traces.log[i]["task"] or "" for i in rows])
    points = {"points": centred[rows] @ axes.T, "cluster": partition["task"][rows], "label": labels}
    write_arrays(folder / POINTS, points)


def _normal(pool: Pool, features: np.ndarray, partition: dict) -> shift.Normal:
    """What is normal on the calibrate split, measured from the tasks' centres on the train split."""
    train, judged = partition["split"] == 0, partition["split"] == 1
    confidence = np.asarray(router.probabilities(pool.router, jnp.asarray(features[judged]))).max(-1)
    scaled = np.asarray(router.standardised(pool.router, features))
    task = partition["task"]
    return shift.normal(scaled[train], task[train], scaled[judged], task[judged], confidence)


def _replay(traces: Traces, partition: dict) -> Known:
    """Prompts of the train split by which the router remembers its tasks when it learns more."""
    train = np.flatnonzero(partition["split"] == 0)
    names = np.array([traces.log[i]["id"] for i in train])
    own = Known(names, traces.features["prompt"][train], partition["task"][train], np.zeros(len(train), int))
    return bounded_by_task([own])


def _trained(results: dict) -> dict[str, dict[str, Any]] | None:
    """Parameters and seconds of the trunk, if there is one, of the specialists and of `mixed`; None in earlier versions."""
    courses = {"trunk": "trunk", "specialists": results["bank"], "mixed": results["mixed"]}
    known = {part: results[name] for part, name in courses.items() if isinstance(name, str) and name in results}
    if not all("seconds" in own for own in known.values()):
        return None
    return {part: {key: own[key] for key in ("parameters", "seconds")} for part, own in known.items()}


def _labels(traces: Traces, partition: dict, tasks: int) -> list[str | None]:
    """Each cluster's majority label, for measuring; None where the log has none."""
    counts = [Counter() for _ in range(tasks)]
    for line, task in zip(traces.log, partition["task"], strict=True):
        if line["task"] is not None:
            counts[task][line["task"]] += 1
    return [own.most_common(1)[0][0] if own else None for own in counts]
