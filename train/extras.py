"""Adds to a finished pool what needs no training: controls, its specialists merged back into one drafter, and a trigram table.

    python -m train.extras --config configs/testbed.py --out runs/testbed ...

Each method's coefficient is the one with the longest accepted drafts on the calibrate split. `decode.bench --methods
merged-average merged-awd merged-doge` measures what was made. The table is counted in the train split, prompts and the
target's answers; `adaptive` in bench drafts with it.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxspec import merging, sharding, trigrams
from jaxspec.adapters import added, updates
from jaxspec.config import Experiment, command_line
from jaxspec.forced import Judge
from jaxspec.store.families import another_table
from jaxspec.store.loading import load_pool
from jaxspec.store.names import EXTRAS, TRIGRAMS, extra_file
from jaxspec.store.recalibration import sampled
from jaxspec.store.stages import manifest, read_arrays, write_json
from jaxspec.store.tables import write_table
from jaxspec.store.traces import Traces, check_models, read_traces
from jaxspec.store.trees import write_tree

ARITHMETIC, DOGE = (0.125, 0.25, 0.5, 1.0), (0.07, 0.2, 0.6, 1.8)
K = 4  # drafted tokens that a merger is judged at


def run(experiment: Experiment) -> None:
    """Writes `trigrams.npz`, `merged-*.safetensors` and `extras.json` into `out/pool`."""
    manifest(experiment.out, "pool")
    check_models(experiment.out, target=experiment.target, draft=experiment.draft)
    places = {"target": experiment.target, "draft": experiment.draft, "mesh": sharding.asked(experiment.mesh)}
    pool = load_pool(str(Path(experiment.out, "pool")), **places)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    traces = read_traces(experiment.out)
    said: dict[str, dict] = {"adaptive": _counted(pool.path / TRIGRAMS, traces, partition)}
    texts = experiment.calibrate.texts
    judge = Judge(pool.pair, sampled(traces, partition, texts), texts)
    for name, candidates in _mergers(updates(pool.trunk, pool.bank)).items():
        scores, started = {}, time.time()
        for scale, make in tqdm(candidates.items(), desc=name, unit="coefficient"):
            weights = added(pool.trunk, make())
            scores[scale] = float(np.mean([lengths[K] for lengths in judge.lengths(weights) if lengths]))
            if scores[scale] == max(scores.values()):
                best = weights
        write_tree(extra_file(pool.path, name), best)
        said[name] = {"coefficient": max(scores, key=scores.__getitem__), "acceptance_length": scores}
        said[name] |= {"of_specialists": True, "parameters": 0, "seconds": time.time() - started}
        print(
            f"extras: {name}: {max(scores.values()):.3f} tokens a round at K = {K}, coefficient {said[name]['coefficient']}"
        )
    write_json(pool.path / EXTRAS, said)
    if again := another_table(pool):
        print(f"extras: {again}")


def _counted(file: Path, traces: Traces, partition: dict) -> dict[str, float]:
    """Counts the train split's trigrams and writes the table; what is said of it."""
    started = time.time()
    texts = [traces.tokens[i] for i in np.flatnonzero(partition["split"] == 0)]
    table = trigrams.counted(texts)
    write_table(file, table)
    known = int((np.asarray(table.bigram)[:, 1] != trigrams.NOBODY).sum())
    print(f"extras: adaptive: {known} bigrams of {len(texts)} texts in {len(table.bigram)} buckets")
    size: dict[str, float] = {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "bigrams": known,
        "buckets": len(table.bigram),
    }
    return size | {"parameters": 0, "seconds": time.time() - started}


def _mergers(tau: merging.Updates) -> dict[str, dict[float, Callable[[], merging.Updates]]]:
    """For each method its candidates, by coefficient."""
    tasks = jax.tree.leaves(tau)[0].shape[0]
    apart = merging.awd(tau)
    return {
        "merged-average": {1 / tasks: partial(merging.task_arithmetic, tau, 1 / tasks)},
        "merged-awd": {scale: partial(merging.task_arithmetic, apart, scale) for scale in ARITHMETIC},
        "merged-doge": {scale: partial(merging.doge, tau, scale=scale) for scale in DOGE},
    }


if __name__ == "__main__":
    command_line(Experiment, run)
