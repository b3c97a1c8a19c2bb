"""Measures how many tokens to draft on this device, and puts the pool together.

    python -m train.calibrate --config configs/testbed.py --out runs/testbed ...
    python -m train.calibrate --pool runs/testbed/pool --out runs/here

The second calibrates a finished pool again, on another device or for another temperature, by texts that it keeps.
Prompts of the calibrate split are decoded by their tasks' drafters, at `--calibrate.temperature`, one at a time or in as
many slots as jobs will have (on a mesh, on each part of the rows), with each number of drafted tokens; passes interleave,
and the number with the most tokens per second is the pool's, for each of several `--calibrate.slots`. It is 0 where
speculation does not pay.
What every drafter would have had accepted there, at any number, follows from one pass over the target's texts; a task whose
adapter gains nothing is served by what adapters belong on. `--calibrate.further ngram adaptive NAME=POOL NAME=DRAFTER`
measures other families of drafters beside the pool's own, `adaptive` with the pool's table, and with `--pool` the name alone of
a drafter that was added to it measures that.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxspec import expected, forced, pooled, router, serving, sharding
from jaxspec.config import Calibrate, Experiment, UserError, command_line, plain
from jaxspec.requests import MAX_DRAFT, Request, bucket_of, room_of
from jaxspec.store.assembly import assembled
from jaxspec.store.facts import calibration, draft_length, find_pool, served_by_trunk
from jaxspec.store.families import (
    TABLES,
    WITHOUT_WEIGHTS,
    Place,
    beside,
    digest_of_parameters,
    lengths_of,
    options,
    place,
    spoken,
)
from jaxspec.store.huggingface import check_same_tokenizer, read_config, read_tokenizer
from jaxspec.store.loading import load_pool
from jaxspec.store.models import Pair
from jaxspec.store.names import METHODS, TRIGRAMS, added_to, digest_of_added, drafter_names
from jaxspec.store.pool import Pool
from jaxspec.store.recalibration import Sample, read_sample, sampled, write_sample
from jaxspec.store.stages import (
    CLAIM,
    MANIFEST,
    Stage,
    copy_files,
    device_in_use,
    finish,
    manifest,
    open_stage,
    read_arrays,
)
from jaxspec.store.traces import check_models, read_traces
from jaxspec.timing import timed

FULL = 2  # times that requests fill the slots in which they are timed
UNITED = "mixed"  # who serves all rows where that is faster


def run(experiment: Experiment) -> None:
    """Writes `out/pool`: what the stages in `out` made, or a finished pool, calibrated on this device."""
    if experiment.pool:
        return _again(experiment)
    check_new(experiment)
    parents = {name: manifest(experiment.out, name)["digest"] for name in ("trace", "partition", "align", "router")}
    stage = _open(experiment, parents, dtype=experiment.dtype)
    if stage.complete:
        return print(f"calibrate: pool complete in {stage.folder}")
    further = _checked(experiment, experiment.target)
    check_models(experiment.out, target=experiment.target, draft=experiment.draft)
    traces = read_traces(experiment.out)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    sample = sampled(traces, partition, max(experiment.calibrate.texts, experiment.calibrate.prompts))
    write_sample(stage.folder, sample)
    pool = assembled(experiment, stage.folder, traces, partition)
    _finish(stage, pool.facts | _measured(experiment, pool, sample, further))


def _again(experiment: Experiment) -> None:
    """Copies a finished pool and calibrates it by the texts that it keeps; all else stays, but where its models are."""
    folder, facts, digest = find_pool(experiment.pool)
    sample = read_sample(folder)
    files = _named(folder, experiment.calibrate.further)
    stage = _open(experiment, {"pool": digest}, device=device_in_use(), files=files)
    if stage.complete:
        return print(f"calibrate: pool complete in {stage.folder}")
    further = _checked(experiment, experiment.target or facts["target"]["path"], added_to(folder))
    models = {"target": experiment.target, "draft": experiment.draft}
    dtype = experiment.calibrate.dtype or facts["dtype"]
    pool = load_pool(experiment.pool, **models, dtype=dtype, mesh=sharding.asked(experiment.mesh))
    copy_files(folder, stage.folder, (MANIFEST, CLAIM))
    found = {"target": pool.pair.target.path, "draft": pool.pair.draft.path}
    places = {name: facts[name] | {"path": str(Path(path).resolve())} for name, path in found.items()}
    _finish(stage, facts | places | {"dtype": dtype} | _measured(experiment, pool, sample, further))
    kept = {own.name for own in further}
    if lost := [name for name in (*facts["further"], *filter(facts["added"].get, facts["added"])) if name not in kept]:
        said = f"{', '.join(lost)}, which {folder} chooses among, were not asked for and are not measured"
        print(f"calibrate: {said}; --calibrate.further names them, with another --out")


def _named(folder: Path, further: Sequence[str]) -> dict[str, str]:
    """Identities of a pool's files that `further` names: they may come and change while its manifest stays."""
    added = {name: digest_of_added(folder, name) for name in added_to(folder)}
    every = added | {TABLES: digest_of_parameters(folder, TABLES)}
    return {name: every[name] for name in further if name in every}


def check_new(experiment: Experiment) -> None:
    """Raises UserError for what only a finished pool can be asked for."""
    if own := experiment.calibrate.dtype:
        raise UserError(f"--calibrate.dtype {own} is for a finished pool (--pool); of a new one --dtype says it")


def _open(experiment: Experiment, parents: dict[str, str], **known: Any) -> Stage:
    config = {"calibrate": _claimed(experiment.calibrate), **known, "seed": experiment.seed}
    return open_stage(experiment.out, "pool", config=config, parents=parents)


def _measured(experiment: Experiment, pool: Pool, sample: Sample, further: Sequence[Place]) -> dict[str, Any]:
    """What calibration adds to the pool's facts."""
    spec = experiment.calibrate
    others = {own.name: beside(own.pool, pool, own.draft) for own in further if own.pool}
    judge = _judge(pool.pair, sample, spec)
    drafters = tqdm(pool.names, desc="calibrate: acceptance", unit="drafter")
    facts: dict[str, Any] = {"calibrated": {"device": device_in_use(), "temperature": spec.temperature}}
    facts["acceptance_length"] = {name: judge.lengths(pool.drafter(name)) for name in drafters}
    added = [own.name for own in further if not own.pool and own.name not in WITHOUT_WEIGHTS]
    facts["added"] = {name: digest_of_added(pool.path, name) for name in added}
    facts["acceptance_length"] |= {name: judge.lengths(pool.drafter(name)) for name in added}
    facts["further"] = {
        own.name: _of_pool(own, others[own.name], judge) if own.pool else _looked_up(own.name, pool, judge)
        for own in further
        if own.name not in added
    }
    requests = _requests(experiment, sample)
    fewest, *more = _numbers_of_slots(experiment, pool)
    untrained = [name for name in facts["further"] if name in WITHOUT_WEIGHTS]
    table = _timed(experiment, _ways(experiment, pool, others, untrained, fewest, requests), requests)
    rows = {fewest: _with_mixed(table)}
    for name, own in facts["further"].items():
        own["calibration"] = table[name]
    for slots in more:
        rows[slots] = _with_mixed(_timed(experiment, _ways(experiment, pool, {}, (), slots, requests), requests))
    return facts | {"calibration_by_slots": rows}


def _judge(pair: Pair, sample: Sample, spec: Calibrate) -> forced.Judge:
    if spec.temperature == 0:
        return forced.Judge(pair, sample, spec.texts)
    return expected.Judge(pair, sample, spec.texts, spec.temperature)


def _finish(stage: Stage, facts: dict[str, Any]) -> None:
    """Writes the manifest, and prints what was measured."""
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


def _checked(experiment: Experiment, target: str, added: Sequence[str] = ()) -> list[Place]:
    """The families asked for beside the pool's own, for this target, once the draft lengths are known to do."""
    spec = experiment.calibrate
    if max(spec.lengths) > MAX_DRAFT or min(spec.lengths) < 0 or max(spec.lengths) == 0:
        raise UserError(f"calibrate.lengths {spec.lengths} must lie between 0 and {MAX_DRAFT}, one of them above 0")
    return _further(experiment, added, target)


def _further(experiment: Experiment, added: Sequence[str], target: str) -> list[Place]:
    """The families asked for beside the pool's own, some of them added to it; a mistake is told before anything is written."""
    spec = experiment.calibrate
    known = (*added, *WITHOUT_WEIGHTS)
    unknown = next((own for own in spec.further if "=" not in own and own not in known), None)
    if unknown:
        where = f"was added to {experiment.pool}" if experiment.pool else "was added to a pool (--pool says which)"
        raise UserError(
            f"--calibrate.further {unknown!r} is no drafter that {where}; give {', '.join(known)}, NAME=POOL, "
            "NAME=POOL,DRAFT or NAME=DRAFTER"
        )
    found = [Place(own, "", "") if own in known else place("--calibrate.further", own) for own in spec.further]
    if spec.further and min(spec.slots) > 1:
        raise UserError(
            f"--calibrate.slots {' '.join(map(str, spec.slots))} with --calibrate.further: families are chosen among one "
            "prompt at a time; give 1, too"
        )
    names = [own.name for own in found]
    if len(names) > len(set(names)):
        raise UserError(f"--calibrate.further {' '.join(spec.further)}: every family needs a name of its own")
    for own in found:
        if own.pool and own.name in (*METHODS, "trunk", *added):
            raise UserError(
                f"--calibrate.further {own.name}=...: the pool or bench has that name already; give another"
            )
        if own.pool:
            _check_place(own, target)
    return found


def _check_place(own: Place, target: str) -> None:
    """Refuses what is no pool and no drafter of the target's tokenizer."""
    if own.draft or Path(own.pool, MANIFEST).exists():
        find_pool(own.pool)
    elif Path(own.pool, "config.json").exists():
        read_config(own.pool)
        check_same_tokenizer(read_tokenizer(target), read_tokenizer(own.pool), target, own.pool)
    else:
        raise UserError(
            f"--calibrate.further {own.name}={own.pool}: {own.pool!r} is not a pool (it has no {MANIFEST}) and no drafter (it "
            "has no config.json); give OUT/pool of another run or a Hugging Face folder"
        )


def _looked_up(name: str, pool: Pool, judge: forced.Judge) -> dict:
    """What the facts say of a family without weights, its rounds aside."""
    digest = digest_of_parameters(pool.path, name)
    if name == TABLES:
        table = (
            f"the table in {pool.path / TRIGRAMS}"
            if digest
            else "an empty table; `python -m train.extras` counts one, to be measured with --pool and another --out"
        )
        print(f"calibrate: {name}: {table}")
    params = serving.always(pool, name, 1).drafter_params(np.array([router.TRUNK]))
    accepted = judge.looked_up(pooled.without_weights(name, MAX_DRAFT), params)
    return {"pool": "", "draft": "", "digest": digest, "acceptance_length": {name: accepted}}


def _of_pool(own: Place, pool: Pool, judge: forced.Judge) -> dict:
    """What the facts say of another pool's drafters, their rounds aside."""
    drafters = tqdm(pool.names, desc=f"calibrate: acceptance of {own.name}", unit="drafter")
    said = lambda name: f"{own.name}/{name}" if pool.tasks else own.name  # a drafter in a folder is its family
    accepted = {said(name): judge.of(pool.pair).lengths(pool.drafter(name)) for name in drafters}
    where = {"pool": str(pool.path.resolve()), "draft": own.draft and str(Path(own.draft).resolve())}
    return {**where, "digest": pool.digest, "acceptance_length": accepted}


def _say(facts: dict) -> None:
    """Prints what was measured: of every draft length, and of every task."""
    for family, measured in (("", facts), *facts["further"].items()):
        for k, row in calibration(measured).items():
            accuracy = f", draft accuracy {row['draft_accuracy']:.3f}" if k else ", nothing drafted"
            print(
                f"calibrate: {family and f'{family}, '}{spoken(family, k)}: {row['tokens_per_second']:.1f} tokens/s{accuracy}"
            )
    k, names, among = draft_length(facts, least=1), drafter_names(facts), options(facts)
    drafter, length = router.fastest(np.eye(len(facts["tasks"])), among.seconds)
    served = (f"the {names[-1]}" if trunk else "its own drafter" for trunk in served_by_trunk(facts))
    for task, (name, label, by) in enumerate(zip(facts["tasks"], facts["labels"], served, strict=True)):
        of = lambda own, task=task: facts["acceptance_length"][own][task]
        rows = {**{who: of(who) for who in names[len(facts["tasks"]) :]}, "own": of(name)}
        accepted = ", ".join(f"{who} {row[k]:.2f}" for who, row in rows.items() if row)
        who, most = among.names[drafter[task]], among.lengths[length[task]]
        alone = f"{who} at {spoken(who, most)}" if most else "nobody, nothing drafted"
        print(
            f"calibrate: {name} ({label}): tokens a round {accepted}; served by {by}, one prompt at a time by {alone}"
        )


def _ways(
    experiment: Experiment,
    pool: Pool,
    others: dict[str, Pool],
    untrained: Sequence[str],
    slots: int,
    requests: Sequence[Request],
) -> dict:
    """Engine and method of every (family, draft length); the pool's own family has no name."""
    spec, longest = experiment.calibrate, max(len(own.ids) for own in requests)
    rule = "rejection" if spec.temperature else "greedy"
    shape: dict[str, Any] = {"slots": slots, "room": room_of(bucket_of(longest), spec.max_new_tokens)}
    drafting = [k for k in spec.lengths if k]
    ways = {("", k): (pooled.speculative(pool, k, rule, **shape), serving.given(pool, slots)) for k in spec.lengths}
    for k in drafting if slots > 1 else ():  # where it serves all rows, a round has no bank to read
        ways[UNITED, k] = ways["", k][0], serving.always(pool, UNITED, slots)
    for name in untrained:
        method = serving.always(pool, name, slots)
        ways |= {(name, k): (pooled.alone(pool, name, k, rule, **shape), method) for k in lengths_of(name, drafting)}
    for name, other in others.items():
        method = serving.always(other, other.names[-1], slots)  # a round takes as long with any of its drafters
        ways |= {(name, k): (pooled.speculative(other, k, rule, **shape), method) for k in drafting}
    return ways


def _requests(experiment: Experiment, sample: Sample) -> list[Request]:
    """Prompts of the commonest bucket: one program a length is compiled, not one a length and bucket."""
    spec, texts = experiment.calibrate, sample.texts
    buckets = np.array([bucket_of(int(length)) for length in texts.prompt_length])
    commonest = Counter(buckets.tolist()).most_common(1)[0][0]
    order = np.random.default_rng(experiment.seed).permutation(np.flatnonzero(buckets == commonest))
    ids = lambda i: tuple(texts.tokens[i][: texts.prompt_length[i]].tolist())
    drawn = {"max_new_tokens": spec.max_new_tokens, "temperature": spec.temperature, "seed": experiment.seed}
    own = lambda i: {"number": int(sample.number[i]), "route": int(sample.task[i])}
    return [Request(ids=ids(i), **drawn, **own(i)) for i in order[: spec.prompts]]


if __name__ == "__main__":
    command_line(Experiment, run)
