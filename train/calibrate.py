"""Measures how many tokens to draft on this device, and puts the pool together.

    python -m train.calibrate --config configs/testbed.py --out runs/testbed ...

Prompts of the calibrate split are decoded by their tasks' drafters, greedily, one at a time or in as many slots as jobs
will have (on a mesh, on each part of the rows), with each number of drafted tokens; passes interleave, and the number with
the most tokens per second is the pool's. It is 0 where speculation does not pay. What every drafter would have had accepted
there, at any number, follows from one pass over the target's texts; a task whose adapter gains nothing is served by what
adapters belong on.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec import forced, metrics, router, serving, sharding, shift
from jaxspec.config import Experiment, UserError, command_line, plain
from jaxspec.engine import Seconds
from jaxspec.requests import MAX_DRAFT, Request, bucket_of, room_of
from jaxspec.store.models import read_pair
from jaxspec.store.pool import (
    BANK,
    MIXED,
    NORMAL,
    POINTS,
    ROUTER,
    TEST,
    TRUNK_FILE,
    Pool,
    draft_length,
    drafter_names,
    expected_seconds,
    known_pool,
    served_by_trunk,
)
from jaxspec.store.stages import Stage, finish, manifest, open_stage, read_arrays, write_arrays, write_whole
from jaxspec.store.traces import Traces, check_models, read_traces


def run(experiment: Experiment) -> None:
    """Writes `out/pool`."""
    parents = {name: manifest(experiment.out, name)["digest"] for name in ("trace", "partition", "align", "router")}
    config = {"calibrate": plain(experiment.calibrate), "dtype": experiment.dtype, "seed": experiment.seed}
    stage = open_stage(experiment.out, "pool", config=config, parents=parents)
    if stage.complete:
        return print(f"calibrate: pool complete in {stage.folder}")
    lengths = experiment.calibrate.lengths
    if max(lengths) > MAX_DRAFT or min(lengths) < 0 or max(lengths) == 0:
        raise UserError(f"calibrate.lengths {lengths} must lie between 0 and {MAX_DRAFT}, one of them above 0")
    check_models(experiment.out, target=experiment.target, draft=experiment.draft)
    traces = read_traces(experiment.out)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    facts = _facts(experiment, traces, partition)
    _assemble(experiment, stage, traces, partition)
    pool = known_pool(stage.folder, facts, digest="not yet calibrated", mesh=sharding.asked(experiment.mesh))
    write_arrays(stage.folder / NORMAL, _normal(pool, traces.features["prompt"], partition)._asdict())
    judge = forced.Judge(pool.pair, traces, partition, experiment.calibrate.texts)
    drafters = tqdm(pool.names, desc="calibrate: acceptance", unit="drafter")
    facts["acceptance_length"] = {name: judge.lengths(pool.drafter(name)) for name in drafters}
    table = _measure(experiment, pool, traces, partition)
    facts["calibration"] = table
    finish(stage, **facts)
    _say(facts)
    print(f"calibrate: K = {draft_length(facts)}; pool in {stage.folder}")


def _say(facts: dict) -> None:
    """Prints what was measured: of every draft length, and of every task."""
    for k, row in facts["calibration"].items():
        accuracy = f", draft accuracy {row['draft_accuracy']:.3f}" if k else ", nothing drafted"
        print(f"calibrate: K = {k}: {row['tokens_per_second']:.1f} tokens/s{accuracy}")
    k, lengths, names = draft_length(facts, least=1), sorted(facts["calibration"]), drafter_names(facts)
    drafter, length = router.fastest(np.eye(len(facts["tasks"])), expected_seconds(facts, lengths))
    served = (f"the {names[-1]}" if trunk else "its own drafter" for trunk in served_by_trunk(facts))
    for task, (name, label, by) in enumerate(zip(facts["tasks"], facts["labels"], served, strict=True)):
        of = lambda own, task=task: facts["acceptance_length"][own][task]
        rows = {**{who: of(who) for who in names[len(facts["tasks"]) :]}, "own": of(name)}
        accepted = ", ".join(f"{who} {row[k]:.2f}" for who, row in rows.items() if row)
        most = lengths[length[task]]
        alone = f"{names[drafter[task]]} at K = {most}" if most else "nobody, nothing drafted"
        print(
            f"calibrate: {name} ({label}): tokens a round {accepted}; served by {by}, one prompt at a time by {alone}"
        )


def _facts(experiment: Experiment, traces: Traces, partition: dict) -> dict:
    """What the pool's manifest says; all of it is needed to decode with the pool elsewhere."""
    pair = read_pair(experiment.target, experiment.draft, experiment.dtype, sharding.asked(experiment.mesh))
    tasks = len(partition["centroids"])
    align = manifest(experiment.out, "align")["results"]
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
        "mixed": align["mixed"],
        "trunk": "trunk" in align,
        "router_hidden": experiment.router.hidden,
        "fallback_below": experiment.router.fallback_below,
        "max_new_tokens": experiment.trace.max_new_tokens,
        "max_prompt_tokens": experiment.trace.max_prompt_tokens,
    }


def _labels(traces: Traces, partition: dict, tasks: int) -> list[str | None]:
    """Each cluster's majority label, for measuring; None where the log has none."""
    counts = [Counter() for _ in range(tasks)]
    for line, task in zip(traces.log, partition["task"], strict=True):
        if line["task"] is not None:
            counts[task][line["task"]] += 1
    return [own.most_common(1)[0][0] if own else None for own in counts]


def _assemble(experiment: Experiment, stage: Stage, traces: Traces, partition: dict) -> None:
    trunk = [("align", TRUNK_FILE)] if "trunk" in manifest(experiment.out, "align")["results"] else []
    for parent, name in (("align", BANK), ("align", MIXED), *trunk, ("router", ROUTER)):
        source = Path(experiment.out, parent, name)
        write_whole(stage.folder / name, lambda part, source=source: shutil.copyfile(source, part))
    test = [
        json.dumps({**line, "cluster": int(task)})
        for line, task, split in zip(traces.log, partition["task"], partition["split"], strict=True)
        if split == 2
    ]
    write_whole(stage.folder / TEST, lambda part: part.write_text("\n".join(test) + "\n", encoding="utf-8"))
    rows = np.random.default_rng(experiment.seed).permutation(len(traces.log))[:1000]
    centred = traces.features["prompt"] - traces.features["prompt"].mean(0)
    axes = np.linalg.svd(centred[rows], full_matrices=False)[2][:2]
    labels = np.array([traces.log[i]["task"] or "" for i in rows])
    points = {"points": centred[rows] @ axes.T, "cluster": partition["task"][rows], "label": labels}
    write_arrays(stage.folder / POINTS, points)


def _normal(pool: Pool, features: np.ndarray, partition: dict) -> shift.Normal:
    """What is normal on the calibrate split, measured from the tasks' centres on the train split."""
    train, judged = partition["split"] == 0, partition["split"] == 1
    confidence = np.asarray(router.probabilities(pool.router, jnp.asarray(features[judged]))).max(-1)
    scaled = router.standardised(pool.router, features)
    return shift.normal(scaled[train], partition["task"][train], scaled[judged], confidence)


def _measure(experiment: Experiment, pool: Pool, traces: Traces, partition: dict) -> dict[int, dict]:
    spec = experiment.calibrate
    slots = spec.slots * (sharding.num_row_parts(pool.mesh) if pool.mesh else 1)
    rows = _sample(experiment, traces, partition)
    requests = [
        Request(
            ids=tuple(traces.tokens[i][: traces.prompt_length[i]].tolist()),
            max_new_tokens=spec.max_new_tokens,
            number=int(i),
            route=int(partition["task"][i]),
        )
        for i in rows
    ]
    room = room_of(bucket_of(max(len(r.ids) for r in requests)), spec.max_new_tokens)
    engines = {k: serving.speculative(pool, k, slots=slots, room=room) for k in spec.lengths}
    method = serving.given(pool, slots)
    seconds: dict[int, list[Seconds]] = {k: [] for k in spec.lengths}
    counts: dict[int, list] = {}
    with tqdm(total=(spec.passes + 1) * len(engines), desc="calibrate", unit="pass") as bar:
        for number in range(spec.passes + 1):  # the first pass compiles and does not count
            for k, engine in engines.items():
                counts[k] = [completion.counts for completion in engine.complete(requests, method)]
                if number:
                    seconds[k].append(engine.seconds)
                bar.update()
    return {k: _row(counts[k], seconds[k], slots) for k in spec.lengths}


def _sample(experiment: Experiment, traces: Traces, partition: dict) -> np.ndarray:
    """Calibrate prompts of the commonest bucket: one program a length is compiled, not one a length and bucket."""
    rows = np.flatnonzero(partition["split"] == 1)
    buckets = np.array([bucket_of(int(traces.prompt_length[i])) for i in rows])
    commonest = Counter(buckets.tolist()).most_common(1)[0][0]
    order = np.random.default_rng(experiment.seed).permutation(rows[buckets == commonest])
    return order[: experiment.calibrate.prompts]


def _row(counts: list, seconds: list[Seconds], slots: int) -> dict:
    figures = metrics.measures(metrics.total(counts))
    keep = {name: figures[name] for name in ("draft_accuracy", "mean_acceptance_length")}
    rounds = sum(own.num_drafts for own in counts) / slots
    decode = min(own.decode for own in seconds)
    whole = min(map(sum, seconds))
    return {"tokens_per_second": figures["tokens"] / whole, "round_milliseconds": 1e3 * decode / rounds, **keep}


if __name__ == "__main__":
    command_line(Experiment, run)
