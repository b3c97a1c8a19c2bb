"""Trains the prompt classifier on the partition's clusters.

    python -m train.router --config configs/testbed.py --out runs/testbed ...

It is fit on the train split and judged on the calibrate split; it sees prompts alone, whatever the clusters were made of.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxspec import router
from jaxspec.config import Experiment, command_line, plain
from jaxspec.store.stages import finish, manifest, open_stage, read_arrays
from jaxspec.store.traces import read_traces
from jaxspec.store.trees import write_tree


def run(experiment: Experiment) -> None:
    """Writes `out/router/router.safetensors`."""
    parents = {name: manifest(experiment.out, name)["digest"] for name in ("trace", "partition")}
    config = {"router": plain(experiment.router), "seed": experiment.seed}
    stage = open_stage(experiment.out, "router", config=config, parents=parents)
    if stage.complete:
        return print(f"router: complete in {stage.folder}")
    spec = experiment.router
    traces = read_traces(experiment.out)
    partition = read_arrays(Path(experiment.out, "partition", "partition.npz"))
    features, task, split = traces.features["prompt"], partition["task"], partition["split"]
    fresh = router.init(features[split == 0], spec.hidden, len(partition["centroids"]), experiment.seed)
    params = router.train(
        fresh,
        features[split == 0],
        task[split == 0],
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        seed=experiment.seed,
    )
    judged = split == 1
    route = router.choose(np.asarray(router.probabilities(params, jnp.asarray(features[judged]))), spec.fallback_below)
    informed = float(np.mean(route == partition["informed"][judged]))
    accuracy, fallback = float(np.mean(route == task[judged])), float(np.mean(route == router.TRUNK))
    write_tree(stage.folder / "router.safetensors", params)
    finish(
        stage,
        accuracy=accuracy,
        agreement_with_outputs=informed,
        fallback_rate=fallback,
        prompts=int(judged.sum()),
        features=features.shape[1],
    )
    print(f"router: {accuracy:.3f} of the calibrate split to its cluster, {fallback:.3f} to none;")
    print(f"router: {informed:.3f} agree with the assignment made from prompt plus output")


if __name__ == "__main__":
    command_line(Experiment, run)
