"""Aligns one drafter a task to the target's stored distributions, and `mixed`, the control that routing must beat.

    python -m train.align --config configs/testbed.py --out runs/testbed ...

The specialists, LoRA adapters or full fine-tunes, start from the base, or from a trunk that has seen the union, and are trained
side by side. `mixed` sees the union for as many steps x tokens as trunk and specialists together, as LoRA of the bank's rank
and as a full fine-tune, which goes on from the trunk where there is one; the better on the calibrate split is kept. The
target runs only to score what drafters in training have written themselves (`--align.on-policy`). With `--distributed` it is
one training over the devices of all hosts, which see the same folders and of which the first writes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxspec import sharding
from jaxspec.adapters import Whole, init_bank, merge, scaled
from jaxspec.align import Aligner, aligner, loss_of, optimiser
from jaxspec.config import Align, Experiment, UserError, command_line, plain
from jaxspec.forced import log_q
from jaxspec.packing import packed_rows
from jaxspec.store.huggingface import Model, read_config, read_model
from jaxspec.store.models import read_pair
from jaxspec.store.stages import finish, is_writer, manifest, open_stage, read_arrays
from jaxspec.store.traces import Texts, Traces, check_models, read_traces
from jaxspec.store.trees import write_tree
from jaxspec.training import Course, rows_of, trained
from jaxspec.transformer import abstract
from jaxspec.writing import Writer

CALIBRATE_ROWS = 8


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
    draft = _in_place(experiment, mesh)
    vocab_size = read_config(experiment.target).vocab_size
    results: dict[str, dict] = {}
    write = writing(experiment, traces, draft, mesh) if experiment.align.on_policy else None
    for course in _courses(experiment, traces, partition, draft, vocab_size, results):
        results[course.name] = trained(experiment.align, traces, course, stage.folder, mesh, write)
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
    trees = sharding.gathered(trees)
    for name, tree in trees.items() if is_writer() else ():
        write_tree(stage.folder / f"{name}.safetensors", tree)
    finish(stage, bank=bank, mixed=mixed, **results)
    for name, result in results.items():
        said = f"agreement {result['before']:.3f} -> {result['agreement']:.3f}"
        print(f"align: {name}: {said} on the calibrate split, learning rate {result['learning_rate']:g}")
    print(f"align: the specialists are {bank}, mixed is {mixed}")


def check(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError for settings that do not belong together, or that do not fit the drafter or the mesh."""
    spec = experiment.align
    if spec.trunk and round(spec.trunk * spec.steps) == spec.steps:
        raise UserError(f"--align.trunk {spec.trunk} leaves the specialists no step of {spec.steps}; give less than 1")
    sharding.check(read_config(experiment.draft), mesh, part=sharding.TRAINED)
    sharding.check_rows(spec.rows, mesh, "--align.rows")
    if spec.rows % spec.accumulate:
        raise UserError(
            f"--align.accumulate {spec.accumulate} does not divide --align.rows {spec.rows}; give one that does"
        )
    sharding.check_rows(spec.rows // spec.accumulate, mesh, "a part, --align.rows over --align.accumulate,")
    for name, share in {"on-policy": spec.on_policy, "replay": spec.replay}.items():
        if share and not rows_of(spec, share):
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


def _in_place(experiment: Experiment, mesh: Mesh) -> Model:
    """The base drafter, read straight into the layout that it is trained in."""
    dtype = jnp.dtype(experiment.dtype)
    specs = sharding.param_specs(abstract(read_config(experiment.draft), dtype), sharding.TRAINED)
    return read_model(experiment.draft, dtype, sharding.shardings(specs, mesh))


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
    foreign = rows_of(spec, spec.replay)
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
    pair = read_pair(experiment.target, experiment.draft, experiment.dtype, mesh)._replace(draft=draft)
    traced = manifest(experiment.out, "trace")["config"]["trace"]
    placed = {"temperature": traced["temperature"], "rows": traced["batch"], "placement": sharding.over(mesh)}
    writer, scale = Writer(pair, traces, **placed), experiment.align.alpha / experiment.align.rank

    def write(frozen, params, drafter: int, examples: Sequence[int], step: int) -> Texts:
        full = lambda: jax.tree.map(lambda master, leaf: master[drafter].astype(leaf.dtype), params, draft.params)
        weights = merge(frozen, scaled(params, scale), drafter) if frozen else full()
        seed = np.random.default_rng((experiment.seed, drafter, step)).integers(2**31).item()
        return writer.texts(weights, examples, seed)

    return write


if __name__ == "__main__":
    command_line(Experiment, run)
