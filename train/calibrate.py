"""Measures how many tokens to draft on this device, and puts the pool together.

    python -m train.calibrate --config configs/testbed.py --out runs/testbed ...

Prompts of the calibrate split are decoded by their tasks' drafters, greedily, one at a time or in as many slots as jobs
will have (on a mesh, on each part of the rows), with each number of drafted tokens; passes interleave, and the number with
the most tokens per second is the pool's, for each of several `--calibrate.slots`. It is 0 where speculation does not pay.
What every drafter would have had accepted there, at any number, follows from one pass over the target's texts; a task whose
adapter gains nothing is served by what adapters belong on. `--calibrate.further ngram NAME=POOL` measures other families of
drafters beside the pool's own.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec import forced, router, serving, sharding, shift
from jaxspec.config import Calibrate, Experiment, UserError, command_line, plain
from jaxspec.drafters import ngram_drafter
from jaxspec.replay import Known, bounded_by_task
from jaxspec.requests import MAX_DRAFT, Request, bucket_of, room_of
from jaxspec.store.families import NGRAM, Place, options, place
from jaxspec.store.models import read_pair
from jaxspec.store.pool import (
    BANK,
    MIXED,
    NORMAL,
    POINTS,
    REPLAY,
    ROUTER,
    TEST,
    TRUNK_FILE,
    Pool,
    calibration,
    draft_length,
    drafter_names,
    find_pool,
    known_pool,
    load_beside,
    served_by_trunk,
)
from jaxspec.store.stages import Stage, finish, manifest, open_stage, read_arrays, write_arrays, write_whole
from jaxspec.store.traces import Traces, check_models, read_traces
from jaxspec.timing import timed

FULL = 2  # times that requests fill the slots in which they are timed
UNITED = "mixed"  # who serves all rows where that is faster


def run(experiment: Experiment) -> None:
    """Writes `out/pool`."""
    parents = {name: manifest(experiment.out, name)["digest"] for name in ("trace", "partition", "align", "router")}
    config = {"calibrate": _claimed(experiment.calibrate), "dtype": experiment.dtype, "seed": experiment.seed}
    stage = open_stage(experiment.out, "pool", config=config, parents=parents)
    if stage.complete:
        return print(f"calibrate: pool complete in {stage.folder}")
    lengths = experiment.calibrate.lengths
    if max(lengths) > MAX_DRAFT or min(lengths) < 0 or max(lengths) == 0:
        raise UserError(f"calibrate.lengths {lengths} must lie between 0 and {MAX_DRAFT}, one of them above 0")
    further = _further(experiment.calibrate)
    check_models(experiment.out, target=experiment.target, draft=experiment.draft)
    traces = read_traces(experiment.out)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    facts = _facts(experiment, traces, partition)
    _assemble(experiment, stage, traces, partition)
    pool = known_pool(stage.folder, facts, digest="not yet calibrated", mesh=sharding.asked(experiment.mesh))
    write_arrays(stage.folder / NORMAL, _normal(pool, traces.features["prompt"], partition)._asdict())
    write_arrays(stage.folder / REPLAY, _replay(traces, partition)._asdict())
    others = {own.name: load_beside(own.pool, pool, own.draft) for own in further if own.pool}
    judge = forced.Judge(pool.pair, traces, partition, experiment.calibrate.texts)
    drafters = tqdm(pool.names, desc="calibrate: acceptance", unit="drafter")
    facts["acceptance_length"] = {name: judge.lengths(pool.drafter(name)) for name in drafters}
    facts["further"] = {
        own.name: _looked_up(judge) if own.name == NGRAM else _of_pool(own, others[own.name], judge) for own in further
    }
    requests = _sample(experiment, traces, partition)
    fewest, *more = _numbers_of_slots(experiment, pool)
    table = _timed(experiment, _ways(experiment, pool, others, NGRAM in facts["further"], fewest, requests), requests)
    rows = {fewest: _with_mixed(table)}
    for name, own in facts["further"].items():
        own["calibration"] = table[name]
    for slots in more:
        rows[slots] = _with_mixed(_timed(experiment, _ways(experiment, pool, {}, False, slots, requests), requests))
    facts["calibration_by_slots"] = rows
    finish(stage, **facts)
    _say(facts)
    by_slots = ", ".join(
        f"K = {draft_length(facts, slots=own)} in {own} slots" for own in facts["calibration_by_slots"]
    )
    print(f"calibrate: {by_slots}; pool in {stage.folder}")


def _claimed(spec: Calibrate) -> dict:
    """The settings as a pool's folder claims them, one number of slots as before there could be several."""
    return {**plain(spec), "slots": spec.slots[0] if len(spec.slots) == 1 else sorted(set(spec.slots))}


def _numbers_of_slots(experiment: Experiment, pool: Pool) -> list[int]:
    """Rows decoded together in each measurement, ascending."""
    parts = sharding.num_row_parts(pool.mesh) if pool.mesh else 1
    return [own * parts for own in sorted(set(experiment.calibrate.slots))]


def _timed(experiment: Experiment, ways: dict, requests: Sequence[Request]) -> dict[str, dict[int, dict]]:
    """What was measured of every draft length by family; requests come again where they do not fill the slots twice."""
    slots = next(iter(ways.values()))[0].slots
    filling = list(islice(cycle(requests), max(len(requests), FULL * slots)))
    table: dict[str, dict] = defaultdict(dict)
    for (name, k), row in timed(ways, filling, experiment.calibrate.passes).items():
        table[name][k] = row
    return table


def _with_mixed(table: dict[str, dict[int, dict]]) -> dict[int, dict]:
    """The pool's own rows, with what rounds take where `mixed` serves all slots."""
    united = table.get(UNITED, {})
    return {
        k: row | {"mixed_round_milliseconds": united.get(k, row)["round_milliseconds"]} for k, row in table[""].items()
    }


def _further(spec: Calibrate) -> list[Place]:
    """The families asked for beside the pool's own."""
    found = [Place(own, "", "") if own == NGRAM else place("--calibrate.further", own) for own in spec.further]
    if spec.further and min(spec.slots) > 1:
        raise UserError(
            f"--calibrate.slots {' '.join(map(str, spec.slots))} with --calibrate.further: families are chosen among one "
            "prompt at a time; give 1, too"
        )
    names = [own.name for own in found]
    if len(names) > len(set(names)):
        raise UserError(f"--calibrate.further {' '.join(spec.further)}: every family needs a name of its own")
    for own in found:
        if own.pool:
            find_pool(own.pool)  # a mistake is told before anything is written
    return found


def _looked_up(judge: forced.Judge) -> dict:
    """What the facts say of n-gram lookup, its rounds aside."""
    accepted = {NGRAM: judge.looked_up(ngram_drafter(MAX_DRAFT))}
    return {"pool": "", "draft": "", "digest": "", "acceptance_length": accepted}


def _of_pool(own: Place, pool: Pool, judge: forced.Judge) -> dict:
    """What the facts say of another pool's drafters, their rounds aside."""
    drafters = tqdm(pool.names, desc=f"calibrate: acceptance of {own.name}", unit="drafter")
    accepted = {f"{own.name}/{name}": judge.of(pool.pair).lengths(pool.drafter(name)) for name in drafters}
    where = {"pool": str(pool.path.resolve()), "draft": own.draft and str(Path(own.draft).resolve())}
    return {**where, "digest": pool.digest, "acceptance_length": accepted}


def _say(facts: dict) -> None:
    """Prints what was measured: of every draft length, and of every task."""
    for family, measured in (("", facts), *facts["further"].items()):
        for k, row in calibration(measured).items():
            accuracy = f", draft accuracy {row['draft_accuracy']:.3f}" if k else ", nothing drafted"
            print(f"calibrate: {family and f'{family}, '}K = {k}: {row['tokens_per_second']:.1f} tokens/s{accuracy}")
    k, names, among = draft_length(facts, least=1), drafter_names(facts), options(facts)
    drafter, length = router.fastest(np.eye(len(facts["tasks"])), among.seconds)
    served = (f"the {names[-1]}" if trunk else "its own drafter" for trunk in served_by_trunk(facts))
    for task, (name, label, by) in enumerate(zip(facts["tasks"], facts["labels"], served, strict=True)):
        of = lambda own, task=task: facts["acceptance_length"][own][task]
        rows = {**{who: of(who) for who in names[len(facts["tasks"]) :]}, "own": of(name)}
        accepted = ", ".join(f"{who} {row[k]:.2f}" for who, row in rows.items() if row)
        most = among.lengths[length[task]]
        alone = f"{among.names[drafter[task]]} at K = {most}" if most else "nobody, nothing drafted"
        print(
            f"calibrate: {name} ({label}): tokens a round {accepted}; served by {by}, one prompt at a time by {alone}"
        )


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
        "curves": _curves(Path(experiment.out, "align", "metrics.jsonl")),
    }


def _trained(results: dict) -> dict[str, dict[str, Any]] | None:
    """Parameters and seconds of the trunk, if there is one, of the specialists and of `mixed`; None in earlier versions."""
    courses = {"trunk": "trunk", "specialists": results["bank"], "mixed": results["mixed"]}
    known = {part: results[name] for part, name in courses.items() if isinstance(name, str) and name in results}
    if not all("seconds" in own for own in known.values()):
        return None
    return {part: {key: own[key] for key in ("parameters", "seconds")} for part, own in known.items()}


def _curves(file: Path) -> dict[str, dict[str, list]]:
    """Of every course of alignment `step`, and at each of them `loss` and `agreement` of its drafters."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = {(line["course"], line["step"]): line for line in lines}  # a killed run has said some steps twice
    curves: dict[str, dict[str, list]] = {}
    for line in last.values():
        own = curves.setdefault(line["course"], {"step": [], "loss": [], "agreement": []})
        for name, column in own.items():
            column.append(line[name])
    return curves


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
    scaled = np.asarray(router.standardised(pool.router, features))
    task = partition["task"]
    return shift.normal(scaled[train], task[train], scaled[judged], task[judged], confidence)


def _replay(traces: Traces, partition: dict) -> Known:
    """Prompts of the train split by which the router remembers its tasks when it learns more."""
    train = np.flatnonzero(partition["split"] == 0)
    names = np.array([traces.log[i]["id"] for i in train])
    own = Known(names, traces.features["prompt"][train], partition["task"][train], np.zeros(len(train), int))
    return bounded_by_task([own])


def _ways(
    experiment: Experiment,
    pool: Pool,
    others: dict[str, Pool],
    looks_up: bool,
    slots: int,
    requests: Sequence[Request],
) -> dict:
    """Engine and method of every (family, draft length); the pool's own family has no name."""
    spec, longest = experiment.calibrate, max(len(own.ids) for own in requests)
    shape: dict[str, Any] = {"slots": slots, "room": room_of(bucket_of(longest), spec.max_new_tokens)}
    drafting = [k for k in spec.lengths if k]
    ways = {("", k): (serving.speculative(pool, k, **shape), serving.given(pool, slots)) for k in spec.lengths}
    for k in drafting if slots > 1 else ():  # where it serves all rows, a round has no bank to read
        ways[UNITED, k] = ways["", k][0], serving.always(pool, UNITED, slots)
    for k in drafting if looks_up else ():
        ways[NGRAM, k] = serving.looking_up(pool, k, **shape), serving.always(pool, NGRAM, slots)
    for name, other in others.items():
        method = serving.always(other, UNITED, slots)  # a round takes as long with any of its drafters
        ways |= {(name, k): (serving.speculative(other, k, **shape), method) for k in drafting}
    return ways


def _sample(experiment: Experiment, traces: Traces, partition: dict) -> list[Request]:
    """Calibrate prompts of the commonest bucket: one program a length is compiled, not one a length and bucket."""
    spec, rows = experiment.calibrate, np.flatnonzero(partition["split"] == 1)
    buckets = np.array([bucket_of(int(traces.prompt_length[i])) for i in rows])
    commonest = Counter(buckets.tolist()).most_common(1)[0][0]
    order = np.random.default_rng(experiment.seed).permutation(rows[buckets == commonest])
    ids = lambda i: tuple(traces.tokens[i][: traces.prompt_length[i]].tolist())
    settings = lambda i: {"max_new_tokens": spec.max_new_tokens, "number": int(i), "route": int(partition["task"][i])}
    return [Request(ids=ids(i), **settings(i)) for i in order[: spec.prompts]]


if __name__ == "__main__":
    command_line(Experiment, run)
