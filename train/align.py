"""Aligns one drafter a task to the target's stored distributions, and `mixed`, the control that routing must beat.

    python -m train.align --config configs/testbed.py --out runs/testbed ...

The specialists, LoRA adapters or full fine-tunes, start from the base, or from a trunk that has seen the union, and are trained
side by side. `mixed` sees the union for as many steps x tokens as trunk and specialists together, as LoRA of the bank's rank
and as a full fine-tune, which goes on from the trunk where there is one; the better on the calibrate split is kept. The
target runs only to score what drafters in training have written themselves (`--align.on-policy`). With `--distributed` it is
one training over the devices of all hosts, which see the same folders and of which the first writes.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxspec import sharding
from jaxspec.adapters import Whole, init_bank, merge, scaled
from jaxspec.align import Aligner, AlignState, Batch, aligner, loss_of, optimiser, schedule
from jaxspec.config import Align, Experiment, UserError, command_line, plain
from jaxspec.forced import log_q
from jaxspec.packing import as_batch, packed_rows, places
from jaxspec.store.huggingface import Model, read_config, read_model
from jaxspec.store.models import read_pair
from jaxspec.store.stages import finish, is_writer, manifest, open_stage, read_arrays, write_json
from jaxspec.store.traces import Texts, Traces, check_models, read_traces
from jaxspec.store.trees import Checkpoints, write_tree
from jaxspec.writing import Writer

CALIBRATE_ROWS = 8
LOGITS = 1 << 32  # bytes of logits of the drafters that are trained in one product
SEARCH_WARMUP = 0.3  # in a short run a high rate would be met before Adam knows its scale


class Course(NamedTuple):
    """One training run: its name, the drafters trained side by side, where rows come from, and how long.

    params: stacked `[D, ...]`; frozen: what all of them share; train, held: rows of each drafter; falls: whether the
    learning rate ends low, or another run goes on from this one.
    """

    name: str
    aligner: Aligner
    frozen: Any
    params: Any
    train: list[list[list[int]]]
    held: list[list[list[int]]]
    steps: int
    rates: tuple[float, ...]
    falls: bool = True


def run(experiment: Experiment) -> None:
    """Writes `out/align`: `bank.safetensors`, `mixed.safetensors`, with a trunk `trunk.safetensors`, and `metrics.jsonl`."""
    if experiment.distributed:
        sharding.start()
    mesh = _mesh(experiment)
    check(experiment, mesh)
    parents = {name: manifest(experiment.out, name)["digest"] for name in ("trace", "partition")}
    config = {"align": plain(experiment.align), "dtype": experiment.dtype, "seed": experiment.seed}
    stage = open_stage(experiment.out, "align", config=config, parents=parents)
    if stage.complete:
        return print(f"align: complete in {stage.folder}")
    check_models(experiment.out, target=experiment.target, draft=experiment.draft)
    traces = read_traces(experiment.out)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    draft = read_model(experiment.draft, jnp.dtype(experiment.dtype))
    vocab_size = read_config(experiment.target).vocab_size
    results: dict[str, dict] = {}
    write = writing(experiment, traces, draft, mesh) if experiment.align.on_policy else None
    for course in _courses(experiment, traces, partition, draft, vocab_size, results):
        results[course.name] = trained(experiment, traces, course, stage.folder, mesh, write)
    params = {name: result.pop("params") for name, result in results.items()}
    best = lambda kind: max((own for own in results if own.startswith(kind)), key=lambda own: results[own]["agreement"])
    bank, mixed = best("bank"), best("mixed")
    scale = experiment.align.alpha / experiment.align.rank
    cast = lambda masters: jax.tree.map(lambda own, leaf: own.astype(leaf.dtype), masters, draft.params)
    trees = {
        "bank": scaled(params[bank], scale) if bank == "bank_lora" else Whole(cast(params[bank])),
        "mixed": scaled(params[mixed], scale) if mixed == "mixed_lora" else cast(_only(params[mixed])),
        **({"trunk": cast(_only(params["trunk"]))} if "trunk" in params else {}),
    }
    for name, tree in trees.items() if is_writer() else ():
        write_tree(stage.folder / f"{name}.safetensors", tree)
    finish(stage, bank=bank, mixed=mixed, **results)
    for name, result in results.items():
        said = f"agreement {result['before']:.3f} -> {result['agreement']:.3f}"
        print(f"align: {name}: {said} on the calibrate split, learning rate {result['learning_rate']:g}")
    print(f"align: the specialists are {bank}, mixed is {mixed}")


def check(experiment: Experiment, mesh: Mesh) -> None:
    """Raises UserError for settings that do not belong together."""
    spec = experiment.align
    if spec.trunk and round(spec.trunk * spec.steps) == spec.steps:
        raise UserError(f"--align.trunk {spec.trunk} leaves the specialists no step of {spec.steps}; give less than 1")
    sharding.check_rows(spec.rows, mesh, "--align.rows")
    if spec.rows % spec.accumulate:
        raise UserError(
            f"--align.accumulate {spec.accumulate} does not divide --align.rows {spec.rows}; give one that does"
        )
    sharding.check_rows(spec.rows // spec.accumulate, mesh, "a part, --align.rows over --align.accumulate,")
    for name, share in {"on-policy": spec.on_policy, "replay": spec.replay}.items():
        if share and not _rows_of(spec, share):
            raise UserError(
                f"--align.{name} {share} of --align.rows {spec.rows} is no row; give {1 / spec.rows} or more"
            )
    if not spec.temperature:
        raise UserError(
            "--align.temperature 0.0 leaves nothing to compare; give a number above 0, 1 for the models' own"
        )
    if spec.beta in (0, 1):
        raise UserError(f"--align.beta {spec.beta} mixes nothing; give a share between 0 and 1, or another divergence")
    if not spec.select:
        raise UserError("--align.select 0.0 leaves no token to learn from; give a share above 0, 1 for all tokens")
    if spec.on_policy and spec.checkpoint_every % spec.refresh:
        raise UserError(
            f"--align.refresh {spec.refresh} does not divide --align.checkpoint-every {spec.checkpoint_every}, after "
            "which a killed run could not write its texts again; give one that does"
        )
    if spec.on_policy and spec.divergence == "negative_log_likelihood":
        raise UserError(
            "--align.on-policy with --align.divergence negative_log_likelihood would teach the drafter its own texts; give "
            "a divergence between distributions, such as forward_kl"
        )
    if spec.on_policy and experiment.distributed:
        raise UserError("--align.on-policy needs the target on this host alone; leave --distributed out")


def _rows_of(spec: Align, share: float) -> int:
    """A share of a step's rows."""
    return round(share * spec.rows)


def _mesh(experiment: Experiment) -> Mesh:
    """The mesh asked for; of several hosts all devices, none of which may stand idle."""
    data, model = experiment.mesh.data, experiment.mesh.model
    if experiment.distributed and (data, model) == (1, 1):
        data = jax.device_count()
    if experiment.distributed and data * model != jax.device_count():
        raise UserError(
            f"--mesh.data {data} and --mesh.model {model} leave out some of the job's {jax.device_count()} devices; "
            "give two numbers whose product that is, or leave both out"
        )
    return sharding.make_mesh(data, model)


def _courses(
    experiment: Experiment, traces: Traces, partition: dict, draft: Model, vocab_size: int, results: dict[str, dict]
) -> Iterator[Course]:
    """The runs in order; what the trunk has learnt is in `results` when the next begins."""
    spec = experiment.align
    task, split = partition["task"], partition["split"]
    tasks = len(partition["centroids"])
    lengths = [len(own) for own in traces.tokens]
    key = jax.random.key(experiment.seed)

    def rows(examples: np.ndarray, number: int) -> list[list[int]]:
        return packed_rows(lengths, examples, number, spec.row_tokens, experiment.seed)

    def own(name: int, t: int) -> np.ndarray:
        found = np.flatnonzero((split == name) & (task == t))
        return found if len(found) else union(name)  # a task without prompts in a split takes the split's union

    union = lambda name: np.flatnonzero(split == name)
    long = tasks * spec.steps
    shared = round(spec.trunk * spec.steps)
    rest = spec.steps - shared
    everything = rows(union(0), long * spec.rows)
    specialists = [_replayed(spec, rows(own(0, t), rest * spec.rows), everything) for t in range(tasks)]
    first, then = everything[: tasks * shared * spec.rows], everything[tasks * shared * spec.rows :]
    held = [rows(own(1, t), CALIBRATE_ROWS) for t in range(tasks)]
    held_union = [[row for rows_of_task in held for row in rows_of_task]]
    fresh = init_bank(draft.params, key, tasks=1, rank=spec.rank)
    lora = _aligner(experiment, partial(_lora_log_q, draft, spec.alpha / spec.rank, vocab_size))
    full = full_fine_tune(experiment, draft, vocab_size)
    masters = jax.tree.map(lambda x: x[None].astype(jnp.float32), draft.params)
    if shared:
        yield Course(
            "trunk", full, (), masters, [first], held_union, tasks * shared, spec.full_learning_rates, falls=False
        )
        masters = results["trunk"]["params"]
    trunk = jax.tree.map(lambda master, leaf: master[0].astype(leaf.dtype), masters, draft.params)
    each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, tasks, axis=0), tree)
    if "lora" in spec.specialists:
        yield Course("bank_lora", lora, trunk, each(fresh), specialists, held, rest, spec.learning_rates)
    if "full" in spec.specialists:
        yield Course("bank_full", full, (), each(masters), specialists, held, rest, spec.full_learning_rates)
    if "lora" in spec.mixed:
        yield Course("mixed_lora", lora, draft.params, fresh, [everything], held_union, long, spec.learning_rates)
    if "full" in spec.mixed:
        yield Course("mixed_full", full, (), masters, [then], held_union, tasks * rest, spec.full_learning_rates)


def _replayed(spec: Align, rows: list[list[int]], union: list[list[int]]) -> list[list[int]]:
    """A specialist's rows, of which the first of every step are the union's."""
    foreign = _rows_of(spec, spec.replay)
    return [other if i % spec.rows < foreign else own for i, (own, other) in enumerate(zip(rows, union, strict=False))]


def _only(tree: Any) -> Any:
    """What is stacked for one drafter."""
    return jax.tree.map(lambda x: x[0], tree)


def full_fine_tune(experiment: Experiment, draft: Model, vocab_size: int) -> Aligner:
    """Trains all of a drafter's weights; its params are float32 masters."""
    return _aligner(experiment, partial(_full_log_q, draft, vocab_size))


def _aligner(experiment: Experiment, log_q: Callable) -> Aligner:
    spec = experiment.align
    loss = partial(loss_of(spec.divergence, spec.beta), temperature=spec.temperature)
    return aligner(log_q, loss, optimiser(), share=spec.select, parts=spec.accumulate)


def _lora_log_q(draft: Model, scale: float, vocab_size: int, frozen, adapter, tokens, segments, at):
    return log_q(draft.config, frozen, scaled(adapter, scale), tokens, segments, at, vocab_size)


def _full_log_q(draft: Model, vocab_size: int, frozen, params, tokens, segments, at):
    del frozen
    weights = jax.tree.map(lambda master, leaf: master.astype(leaf.dtype), params, draft.params)
    return log_q(draft.config, weights, None, tokens, segments, at, vocab_size)


def writing(experiment: Experiment, traces: Traces, draft: Model, mesh: Mesh) -> Callable[..., Texts]:
    """(a course's frozen, its params, which drafter of it, examples, step) -> what that drafter writes, scored."""
    pair = read_pair(experiment.target, experiment.draft, experiment.dtype, mesh)
    traced = manifest(experiment.out, "trace")["config"]["trace"]
    placed = {"temperature": traced["temperature"], "rows": traced["batch"], "placement": sharding.over(mesh)}
    writer, scale = Writer(pair, traces, **placed), experiment.align.alpha / experiment.align.rank

    def write(frozen, params, drafter: int, examples: Sequence[int], step: int) -> Texts:
        full = lambda: jax.tree.map(lambda master, leaf: master[drafter].astype(leaf.dtype), params, draft.params)
        weights = merge(frozen, scaled(params, scale), drafter) if frozen else full()
        seed = np.random.default_rng((experiment.seed, drafter, step)).integers(2**31).item()
        return writer.texts(weights, examples, seed)

    return write


def trained(
    experiment: Experiment, traces: Traces, course: Course, folder: Path, mesh: Mesh, write: Callable | None
) -> dict:
    """Trains; where tokens are selected, once on all of them before, which makes the reference and finds the rate.

    AdaSPEC trains its reference likewise from where the drafter starts. From a reference that is that start, the base or the
    trunk, only tokens that have become worse would stand out. A trunk, from which others go on, sees all tokens.
    """
    train = partial(_train, experiment, traces, folder=folder, mesh=mesh, write=write)
    if experiment.align.select == 1 or not course.falls:
        return train(course)
    first = train(course._replace(name=f"{course.name}_reference"))
    return train(course._replace(rates=(first["learning_rate"],)), reference=first["params"])


def _train(
    experiment: Experiment,
    traces: Traces,
    course: Course,
    *,
    folder: Path,
    mesh: Mesh,
    write: Callable | None,
    reference: Any = None,
) -> dict:
    """Chooses the learning rate, trains, and says what the calibrate split thinks of it; resumes where it was killed."""
    spec, started = experiment.align, time.time()
    course = course._replace(frozen=_whole(course.frozen, mesh), params=_whole(course.params, mesh))
    room = places(traces, [row for rows in [*course.train, *course.held] for row in rows], spec.row_tokens)
    side_by_side = jax.jit(partial(_each, course.aligner.step), donate_argnums=1)
    evaluate = jax.jit(partial(_each_evaluate, course.aligner.evaluate))
    pack = partial(as_batch, traces, row_tokens=spec.row_tokens, room=room)
    groups = range(0, len(course.held[0]), spec.rows)
    held = [_stack([pack(own[at : at + spec.rows]) for own in course.held], mesh) for at in groups]

    def judge(params) -> tuple[float, float]:
        sums = np.sum([jax.device_get(evaluate(course.frozen, params, batch)) for batch in held], axis=0)
        divergence, agreement, count = sums  # [D] each
        return float((divergence / count).mean()), float((agreement / count).mean())

    feed = _feeding(spec, traces, course, room, mesh, write)

    def advance(state: AlignState, step: int, rate):
        return side_by_side(course.frozen, state, feed(step, state.params), rate, reference)

    before = judge(course.params)
    fresh = lambda: _whole(_fresh(course), mesh)
    rate = _choose_rate(course, spec.search_steps, fresh, advance, judge, folder)
    checkpoints = Checkpoints(folder / "checkpoints" / course.name)
    done, state = checkpoints.latest(fresh())
    progress = tqdm(total=course.steps, initial=done, desc=course.name, disable=not is_writer())
    with open(folder / "metrics.jsonl" if is_writer() else os.devnull, "a") as log, progress as bar:
        for step in range(done, course.steps):
            now = schedule(step, course.steps, rate, spec.warmup, falls=course.falls)
            state, metrics = advance(state, step, now)
            if (step + 1) % 10 == 0 or step + 1 == course.steps:
                said = {name: [round(float(x), 4) for x in value] for name, value in metrics.items()}
                log.write(json.dumps({"course": course.name, "step": step + 1, **said}) + "\n")
                bar.set_postfix(loss=f"{np.mean(said['loss']):.3f}", agreement=f"{np.mean(said['agreement']):.3f}")
            if (step + 1) % spec.checkpoint_every == 0:
                checkpoints.save(step + 1, state)
            bar.update()
    checkpoints.close()
    divergence, agreement = judge(state.params)
    figures = {"before": before[1], "agreement": agreement, "divergence": divergence, "learning_rate": rate}
    cost = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)), "seconds": time.time() - started}
    return {**figures, "steps": course.steps, **cost, "params": state.params}


def _choose_rate(course: Course, steps: int, fresh, advance, judge, folder: Path) -> float:
    """The candidate whose short run, cooled down at its end, leaves the smallest divergence on the calibrate split."""
    file = folder / f"rate-{course.name}.json"
    if file.exists():
        return json.loads(file.read_text())["chosen"]
    if len(course.rates) == 1:
        return course.rates[0]
    scores = {}
    for rate in tqdm(course.rates, desc=f"{course.name}: learning rate", leave=False):
        state = fresh()
        for step in range(min(steps, course.steps)):
            state, _ = advance(state, step, schedule(step, steps, rate, SEARCH_WARMUP))
        scores[rate] = judge(state.params)[0]
    chosen = min(scores, key=scores.__getitem__)
    if is_writer():
        write_json(file, {"chosen": chosen, "divergence": {str(rate): score for rate, score in scores.items()}})
    return chosen


def _fresh(course: Course) -> AlignState:
    return jax.vmap(course.aligner.init)(jax.tree.map(jnp.copy, course.params))


def _whole(tree: Any, mesh: Mesh) -> Any:
    return sharding.place(tree, sharding.param_specs(tree, "drafter"), mesh)


def _each(step: Callable, frozen, state: AlignState, batch: Batch, rate, reference):
    """One step of every drafter."""
    one = lambda own: step(frozen, own[0], own[1], rate, own[2])
    return jax.lax.map(one, (state, batch, reference), batch_size=_together(batch, frozen or state.params))


def _each_evaluate(evaluate: Callable, frozen, params, batch: Batch):
    one = lambda own: evaluate(frozen, own[0], own[1])
    return jax.lax.map(one, (params, batch), batch_size=_together(batch, frozen or params))


def _together(batch: Batch, weights: Any) -> int | None:
    """Drafters in one product: on accelerators, which small ones do not fill, as many as have logits of 4 GB, else one."""
    if jax.default_backend() == "cpu":
        return None
    places, vocab_size = batch.at[0].size, weights["embed"]["embedding"].shape[-2]
    return max(1, min(len(batch.tokens), LOGITS // (4 * places * vocab_size)))


def _feeding(
    spec: Align, traces: Traces, course: Course, room: int, mesh: Mesh, write: Callable | None
) -> Callable[[int, Any], Batch]:
    """(step, params) -> the step's batch: stored texts, and in its last rows what the drafters now say to those prompts.

    They say it anew every `spec.refresh` steps; steps are fed in order from one at which they do.
    """
    pack = partial(as_batch, row_tokens=spec.row_tokens, room=room)
    stored = spec.rows - _rows_of(spec, spec.on_policy)
    given = lambda plan, step: plan[step * spec.rows : step * spec.rows + stored]
    asked = lambda plan, step: plan[step * spec.rows + stored : (step + 1) * spec.rows]
    said: list[tuple[dict[int, int], Texts]] = []

    def feed(step: int, params) -> Batch:
        batches = [pack(traces, given(plan, step)) for plan in course.train]
        if write and step % spec.refresh == 0:
            upto = range(step, min(step + spec.refresh, course.steps))
            wanted = [sorted({i for now in upto for row in asked(plan, now) for i in row}) for plan in course.train]
            texts = (write(course.frozen, params, drafter, own, step) for drafter, own in enumerate(wanted))
            said[:] = [({i: n for n, i in enumerate(own)}, new) for own, new in zip(wanted, texts, strict=True)]
        for drafter, (place, texts) in enumerate(said):
            rows = [[place[i] for i in row] for row in asked(course.train[drafter], step)]
            batches[drafter] = jax.tree.map(lambda *leaves: np.concatenate(leaves), batches[drafter], pack(texts, rows))
        return _stack(batches, mesh)

    return feed


def _stack(batches: list[Batch], mesh: Mesh) -> Batch:
    """Batches of several drafters, `[D, R, ...]`, in their place."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return sharding.place(stacked, sharding.column_specs(stacked, mesh), mesh)


if __name__ == "__main__":
    command_line(Experiment, run)
