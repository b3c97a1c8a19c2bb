"""Trains drafters of features on the texts that a pool was aligned on, and adds them to it.

    python -m train.feature --pool runs/testbed/pool --variants plain sampling alignment

`plain` joins feature and token as EAGLE does, `sampling` as FSPAD does, `alignment` gives the logits a residual of their own
as well. All see the same rows as often, and each is measured with the program that drafts with it; `decode.bench --methods
feature` takes the one with the longest accepted drafts. A variant that is there already stays; a killed run goes on.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxspec import pooled, serving
from jaxspec.align import optimiser, schedule
from jaxspec.config import UserError, command_line, plain
from jaxspec.drafters.feature import FeatureWeights, init_weights, single_layer
from jaxspec.metrics import measures, total
from jaxspec.packing import as_batch, packed_rows, places
from jaxspec.regression import trainer
from jaxspec.requests import Request, bucket_of, room_of
from jaxspec.store.facts import draft_length
from jaxspec.store.features import Learnt, folder_of, measured_of, write_learnt
from jaxspec.store.loading import load_pool
from jaxspec.store.pool import Pool
from jaxspec.store.stages import manifest, open_stage, read_arrays
from jaxspec.store.traces import Traces, check_models, read_traces
from jaxspec.store.trees import Checkpoints

SLOTS = 8  # rows that are decoded together to measure


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Which drafters are trained on what, and how."""

    pool: str
    """Folder of the pool."""
    stages: str = ""
    """Folder of the stages that made the pool; empty is the one that it lies in."""
    variants: tuple[Literal["plain", "sampling", "alignment"], ...] = ("alignment",)
    """Drafters to train, each for all steps."""
    steps: int = 2000
    """Optimiser steps of each."""
    rows: int = 32
    """Packed sequences in a step."""
    row_tokens: int = 256
    """Tokens in a packed sequence."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    logits_weight: float = 0.1
    """Weight of the cross entropy from the target's distribution; that of the feature's smooth L1 is 1."""
    noise: float = 0.1
    """Uniform noise on the features that are read, as a share of their root mean square."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    num_speculative_tokens: int | None = None
    """Tokens drafted a round while measuring; None is what calibration chose."""
    texts: int = 16
    """Calibrate prompts of each task that are measured on."""
    seed: int = 0
    """Seed of the weights, of the order of training and of the noise."""
    target: str = ""
    """Another place of the pool's target."""
    draft: str = ""
    """Another place of the pool's base drafter."""


class Material(NamedTuple):
    """What all variants share: the texts, the rows of all steps, and the prompts that are measured on."""

    traces: Traces
    rows: list[list[int]]
    held: list[Request]


def run(config: Feature) -> None:
    """Writes `POOL/feature/VARIANT` for each variant, and prints how long their accepted drafts are."""
    pool = load_pool(config.pool, target=config.target, draft=config.draft)
    stages = config.stages or str(pool.path.parent)
    material = _material(config, stages)
    check_models(stages, target=pool.pair.target.path)
    apart = ("pool", "stages", "variants", "target", "draft")
    settings = {name: value for name, value in plain(config).items() if name not in apart}
    k = draft_length(pool.facts, config.num_speculative_tokens, least=1)
    said = {"feature": settings | {"num_speculative_tokens": k}, "dtype": pool.facts["dtype"]}
    for variant in dict.fromkeys(config.variants):
        parents = {"trace": manifest(stages, "trace")["digest"], "partition": manifest(stages, "partition")["digest"]}
        stage = open_stage(str(folder_of(pool)), variant, config=said, parents=parents)
        if not stage.complete:
            started = time.time()
            own = Learnt(_layer(pool), _train(config, variant, pool, material, stage.folder))
            cost = {"seconds": time.time() - started}
            write_learnt(stage, variant, own, cost | _measured(pool, own, k, material.held))
    _say(pool, config, k)


def _material(config: Feature, stages: str) -> Material:
    traces = read_traces(stages)
    partition = read_arrays(Path(stages, "partition", "partition.npz"))
    split, task = partition["split"], partition["task"]
    lengths = [len(own) for own in traces.tokens]
    number = config.steps * config.rows
    rows = packed_rows(lengths, np.flatnonzero(split == 0), number, config.row_tokens, config.seed)
    of_task = (np.flatnonzero((split == 1) & (task == t))[: config.texts] for t in range(len(partition["centroids"])))
    held = [_request(traces, int(i)) for own in of_task for i in own]
    if not held:
        raise UserError(f"{stages} has no calibrate prompts to measure on; give a pool whose log has more lines")
    return Material(traces, rows, held)


def _request(traces: Traces, i: int) -> Request:
    own, length = traces.tokens[i].tolist(), int(traces.prompt_length[i])
    return Request(ids=tuple(own[:length]), max_new_tokens=len(own) - length, number=i)


def _layer(pool: Pool) -> Any:
    return single_layer(pool.pair.target.config)


def _train(config: Feature, variant: str, pool: Pool, material: Material, folder: Path) -> FeatureWeights:
    """Trains one variant; resumes where it was killed."""
    target, layer, key = pool.pair.target, _layer(pool), jax.random.key(config.seed)
    known = {"logits_weight": config.logits_weight, "noise": config.noise, "dtype": jnp.dtype(pool.facts["dtype"])}
    own = trainer(target.config, layer, optimiser(), **known)
    advance = jax.jit(own.step, donate_argnums=1)
    room = places(material.traces, material.rows, config.row_tokens)
    pack = partial(as_batch, material.traces, row_tokens=config.row_tokens, room=room)
    checkpoints = Checkpoints(folder / "checkpoints")
    done, state = checkpoints.latest(own.init(init_weights(layer, variant, target.params, key)))
    progress = tqdm(total=config.steps, initial=done, desc=variant)
    with open(folder / "metrics.jsonl", "a") as log, progress as bar:
        for step in range(done, config.steps):
            batch = pack(material.rows[step * config.rows : (step + 1) * config.rows])
            rate = schedule(step, config.steps, config.learning_rate, config.warmup)
            state, metrics = advance(target.params, state, batch, rate, jax.random.fold_in(key, step))
            if (step + 1) % 10 == 0 or step + 1 == config.steps:
                said = {name: round(float(value), 4) for name, value in metrics.items()}
                log.write(json.dumps({"step": step + 1, **said}) + "\n")
                bar.set_postfix(said)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoints.save(step + 1, state)
            bar.update()
    checkpoints.close()
    return state.params


def _measured(pool: Pool, own: Learnt, k: int, held: list[Request]) -> dict:
    """What is accepted of a drafter's chains of `k` tokens in answers to prompts that it was not trained on."""
    bucket, longest = bucket_of(max(len(r.ids) for r in held)), max(r.max_new_tokens for r in held)
    size = {"slots": SLOTS, "admit_rows": SLOTS}
    engine = pooled.guessing(pool, own, k, "greedy", **size, room=room_of(bucket, longest), smallest=bucket)
    done = engine.complete(held, serving.featured(pool, own, SLOTS))
    figures = measures(total(completion.counts for completion in done))
    return {**figures, "parameters": sum(leaf.size for leaf in jax.tree.leaves(own.weights))}


def _say(pool: Pool, config: Feature, k: int) -> None:
    found = measured_of(pool)
    print(f"| features, K = {k}, {config.steps} steps | parameters | draft accuracy | mean acceptance length |")
    print("|---|---:|---:|---:|")
    for name in dict.fromkeys(config.variants):
        own = found[name]
        figures = f"{own['draft_accuracy']:.3f} | {own['mean_acceptance_length']:.3f}"
        print(f"| {name} | {own['parameters']:,} | {figures} |")


if __name__ == "__main__":
    command_line(Feature, run)
