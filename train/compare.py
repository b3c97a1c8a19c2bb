"""Compares ways of aligning one drafter: divergences x whose texts it learns from, each from the same base and as long.

    python -m train.compare --config configs/distillspec.py --target DIR --draft DIR --prompts LOG --out runs/distillspec

Every cell is one full fine-tune on the union of the tasks, measured by decoding prompts that no cell has seen: of those
tasks, and of tasks that nobody trained on (`outside`). Block efficiency is tokens a target call; the memory-bound speedup
divides it by c K + 1, c being the drafter's parameters over the target's, as though time were bytes (Direct Alignment,
https://arxiv.org/abs/2403.00858); the token rate is measured, against autoregressive decoding in as many slots. A finished
cell is skipped, a killed one goes on where it was.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec import metrics, sharding, verify
from jaxspec.config import Comparison, Experiment, UserError, command_line, plain
from jaxspec.drafters import lm_drafter, silent_drafter
from jaxspec.drafters.lm import LMDrafterParams
from jaxspec.engine import Engine, Method, unrouted
from jaxspec.packing import packed_rows
from jaxspec.requests import Request, bucket_of, checked, room_of
from jaxspec.store.models import Pair, encode, read_pair
from jaxspec.store.prompts import Line, read_prompts
from jaxspec.store.stages import finish, manifest, open_stage, write_json
from jaxspec.store.traces import Traces, read_traces, split_of
from jaxspec.store.trees import read_tree, write_tree
from jaxspec.target import lm_target
from jaxspec.training import Course, trained
from jaxspec.types import Placement
from train import align, trace

ON_POLICY, WRITTEN_BY = "on-policy", "target"  # its prompts and their lengths are those of the target's texts
WEIGHTS = "drafter.safetensors"
HELD = 32  # packed rows of the calibrate split by which a learning rate is chosen


class Asked(NamedTuple):
    """Prompts by the task's label, at temperature 0; `outside` names those of no cell's tasks."""

    requests: dict[str, list[Request]]
    outside: tuple[str, ...]


class Way(NamedTuple):
    """One way of decoding all drafters: so many drafted tokens, at this temperature."""

    drafted: int
    temperature: float
    engine: Engine


def run(comparison: Comparison) -> None:
    """Prints a table and writes `out/comparison.json`."""
    _check(comparison)
    mesh = sharding.asked(comparison.mesh)
    sharding.check_rows(comparison.slots, mesh, "--slots")
    outside = read_prompts(comparison.prompts, include=comparison.outside) if comparison.outside else []
    pair = read_pair(comparison.target, comparison.draft, comparison.dtype, mesh)
    for texts in dict.fromkeys(_written_by(own) for own in comparison.sources):
        trace.run(_of(comparison, texts))
    asked = _asked(comparison, pair, outside)
    drafters = {"base": pair.draft.params}
    for divergence, source in itertools.product(comparison.divergences, comparison.sources):
        if not (divergence == "negative_log_likelihood" and source == ON_POLICY):  # it would be taught what it says
            drafters[f"{divergence}, {source}"] = _cell(comparison, pair, divergence, source)
    ways = _ways(comparison, pair, asked, sharding.over(mesh))
    shown = tqdm(drafters.items(), desc="measure", unit="drafter")
    rows = {name: _measured(pair, weights, asked, ways) for name, weights in shown}
    write_json(Path(comparison.out, "comparison.json"), {"schema": 1, **_conditions(comparison, pair), "rows": rows})
    _print(comparison, rows)


def _check(comparison: Comparison) -> None:
    for number in comparison.drafted:
        if checked("num_speculative_tokens", number) == 0:
            raise UserError("--drafted 0 drafts nothing, and drafters are compared; give numbers from 1")
    if not comparison.outside:
        return
    twice = set(comparison.outside) & set(comparison.include)
    if twice or not comparison.include:
        said = f"--outside {' '.join(sorted(twice or comparison.outside))}"
        raise UserError(f"{said}: cells train on that, too; name the files to train on with --include, and others here")


def _written_by(source: str) -> str:
    return WRITTEN_BY if source == ON_POLICY else source


def _of(comparison: Comparison, texts: str) -> Comparison:
    """The experiment whose trace has texts by that writer."""
    return replace(comparison, out=str(Path(comparison.out, texts)), trace=replace(comparison.trace, texts=texts))


def _cell(comparison: Comparison, pair: Pair, divergence: str, source: str) -> dict:
    """One drafter's weights, trained if they are not there."""
    own = _of(comparison, _written_by(source))
    share = 1.0 if source == ON_POLICY else 0.0
    experiment = replace(own, align=replace(own.align, divergence=divergence, on_policy=share))
    parents = {"trace": manifest(experiment.out, "trace")["digest"]}
    config = {"align": plain(experiment.align), "dtype": experiment.dtype, "seed": experiment.seed}
    stage = open_stage(comparison.out, f"{divergence}-{source}", config=config, parents=parents)
    file = stage.folder / WEIGHTS
    if not stage.complete:
        found = _aligned(experiment, pair, stage.folder)
        params = found.pop("params")
        write_tree(file, jax.tree.map(lambda master, leaf: master[0].astype(leaf.dtype), params, pair.draft.params))
        finish(stage, **found)
    return read_tree(file, pair.draft.params)


def _aligned(experiment: Experiment, pair: Pair, folder: Path) -> dict:
    """What `trained` says of a full fine-tune on the union."""
    traces, spec = read_traces(experiment.out), experiment.align
    mesh = sharding.make_mesh(experiment.mesh.data, experiment.mesh.model)
    align.check(experiment, mesh)
    split = split_of(len(traces.tokens), experiment.seed)
    lengths = [len(own) for own in traces.tokens]
    rows = lambda part, number: packed_rows(
        lengths, np.flatnonzero(split == part), number, spec.row_tokens, experiment.seed
    )
    masters = jax.tree.map(lambda leaf: leaf[None].astype(jnp.float32), pair.draft.params)
    aligner = align.full_fine_tune(experiment, pair.draft, pair.vocab_size)
    train, held = [rows(0, spec.steps * spec.rows)], [rows(1, HELD)]
    course = Course("cell", aligner, (), masters, train, held, spec.steps, spec.full_learning_rates)
    write = align.writing(experiment, traces, pair.draft, mesh) if spec.on_policy else None
    return trained(spec, traces, course, folder, mesh, write)


def _asked(comparison: Comparison, pair: Pair, outside: Sequence[Line]) -> Asked:
    """The first prompts of every task in the traces' test split, and of those outside."""
    traces = read_traces(_of(comparison, _written_by(comparison.sources[0])).out)
    prompts: dict[str, list[Sequence[int]]] = {}
    for i in np.flatnonzero(split_of(len(traces.tokens), comparison.seed) == 2):
        prompts.setdefault(traces.log[i]["task"] or "all", []).append(_prompt(traces, i))
    for line in outside:
        ids = encode(pair.tokenizer, line)
        if len(ids) <= comparison.trace.max_prompt_tokens:
            prompts.setdefault(line.task or "outside", []).append(ids)
    labels = tuple(dict.fromkeys(line.task or "outside" for line in outside))
    most, number = comparison.trace.max_new_tokens, itertools.count()
    as_request = lambda ids: Request(ids=tuple(ids), max_new_tokens=most, number=next(number), seed=comparison.seed)
    return Asked(
        {task: [as_request(ids) for ids in own[: comparison.measured]] for task, own in prompts.items()}, labels
    )


def _prompt(traces: Traces, i: Any) -> list[int]:
    return traces.tokens[i][: traces.prompt_length[i]].tolist()


def _ways(comparison: Comparison, pair: Pair, asked: Asked, placement: Placement) -> list[Way]:
    """The programs that measure; 0 drafted tokens is autoregressive decoding. Drafters' weights are their arguments."""
    dtype = jnp.dtype(comparison.dtype)
    longest = max(len(own.ids) for requests in asked.requests.values() for own in requests)
    smallest = bucket_of(longest, comparison.trace.smallest_bucket)
    shape: dict[str, Any] = {"slots": comparison.slots, "admit_rows": min(8, comparison.slots), "smallest": smallest}
    shape |= {"room": room_of(smallest, comparison.trace.max_new_tokens), "vocab_size": pair.vocab_size}
    shape["placement"] = placement

    def way(drafted: int, temperature: float) -> Way:
        lm = partial(lm_drafter, pair.draft.config, vocab_size=pair.vocab_size, dtype=dtype)
        drafter = lm(drafted) if drafted else silent_drafter(1)
        rule = verify.rejection if temperature else verify.greedy
        target = lm_target(pair.target.config, dtype)
        engine = Engine(target, drafter, rule, pair.target.params, stop_tokens=pair.stop_tokens, **shape)
        return Way(drafted, temperature, engine)

    return [way(k, t) for t in comparison.temperatures for k in (0, *comparison.drafted)]


def _measured(pair: Pair, weights: dict, asked: Asked, ways: Sequence[Way]) -> dict[str, Any]:
    """Figures by way and task: `tokens_per_second` of all tasks together, and of each the measures of its counts."""
    share = _parameters(weights) / _parameters(pair.target.params)
    out: dict[str, Any] = {}
    autoregressive = 0.0
    for way in ways:
        params = LMDrafterParams(weights) if way.drafted else ()
        rate, tasks = _decoded(way, Method("cell", unrouted, lambda routes, params=params: params), asked)
        if not way.drafted:
            autoregressive = rate
            continue
        row = {task: _figures(own, way.drafted, share) for task, own in tasks.items()}
        inside = [own for task, own in row.items() if task not in asked.outside]
        mean = {name: float(np.mean([own[name] for own in inside])) for name in inside[0]}
        said = {"mean": mean, "tasks": row, "tokens_per_second": rate, "token_rate": rate / autoregressive}
        out[f"K = {way.drafted}, T = {way.temperature:g}"] = said
    return out


def _decoded(way: Way, method: Method, asked: Asked) -> tuple[float, dict[str, list]]:
    """Tokens per second over all prompts, compiled beforehand, and every task's completions."""
    settle = [replace(own[0], max_new_tokens=2, temperature=way.temperature) for own in asked.requests.values()]
    way.engine.complete(settle[:1], method)
    tokens, seconds, tasks = 0, 0.0, {}
    for task, own in asked.requests.items():
        tasks[task] = way.engine.complete([replace(one, temperature=way.temperature) for one in own], method)
        tokens += sum(len(one.ids) for one in tasks[task])
        seconds += way.engine.seconds.decode
    return tokens / seconds, tasks


def _figures(completions: Sequence[Any], drafted: int, share: float) -> dict[str, float]:
    found = metrics.measures(metrics.total([own.counts for own in completions]))
    efficiency = found["mean_acceptance_length"]
    return {
        "draft_accuracy": found["draft_accuracy"],
        "block_efficiency": efficiency,
        "memory_bound_speedup": efficiency / (share * drafted + 1),
    }


def _parameters(weights: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def _conditions(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": comparison.dtype,
        "slots": comparison.slots,
        "prompts_a_task": comparison.measured,
        "align": plain(comparison.align),
        "drafter_parameters": _parameters(pair.draft.params),
        "target_parameters": _parameters(pair.target.params),
        "outside": comparison.outside,
    }


def _print(comparison: Comparison, rows: dict[str, dict]) -> None:
    """A table a way: a row a cell, the mean over the tasks and each task outside."""
    for way, first in rows["base"].items():
        outside = [task for task in first["tasks"] if task in comparison.outside]
        print(f"\n{way}, {comparison.dtype}, {comparison.slots} slots, {comparison.align.steps} steps")
        names = ["draft accuracy", "block efficiency", "memory-bound speedup", "token rate", *outside]
        print(f"| drafter | {' | '.join(names)} |\n|---|" + "---:|" * len(names))
        for name, row in rows.items():
            own = row[way]
            cells = [*own["mean"].values(), own["token_rate"]]
            cells += [own["tasks"][task]["draft_accuracy"] for task in outside]
            print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    command_line(Comparison, run)
