"""Prints the memory that decoding an experiment's log needs on each device; no weights and no accelerator needed.

    python -m decode.plan --config configs/llama31_8b_v5e8.py --trace.batch 48

Models are folders, of which config.json is enough, or names of published shapes (`jaxspec/published.py`).
"""

from pathlib import Path

from jaxspec import plan, sharding
from jaxspec.config import Experiment, UserError, command_line
from jaxspec.plan import GIB, Load
from jaxspec.published import PUBLISHED
from jaxspec.store.huggingface import read_config
from jaxspec.transformer import LMConfig


def run(experiment: Experiment) -> None:
    """Prints the plan and the largest batch; UserError when the experiment's does not fit."""
    target, draft = shape_of(experiment.target), shape_of(experiment.draft)
    mesh = sharding.abstract_mesh(experiment.mesh.data, experiment.mesh.model)
    load, memory = load_of(experiment), memory_of(experiment)
    print(f"{experiment.target} with {experiment.draft}, batch {load.batch}, {load.dtype}, on {mesh.shape_tuple}")
    print(plan.table(plan.plan(target, draft, load, mesh)))
    plan.fit(target, draft, load, mesh, memory)
    if memory is None:
        return print("no limit is known; give --mesh.memory GIB")
    largest = plan.largest_batch(target, draft, load, mesh, memory)
    print(f"of {memory / GIB:.2f} GiB a device; the largest batch that fits is {largest}")


def load_of(experiment: Experiment) -> Load:
    """The log's replay with the whole pool in memory: base, mixed, trunk and the bank of as many tasks as there may be."""
    trace, partition = experiment.trace, experiment.partition
    return Load(
        batch=trace.batch,
        prompt_tokens=max(trace.max_prompt_tokens, trace.smallest_bucket),
        max_new_tokens=trace.max_new_tokens,
        num_speculative_tokens=trace.num_speculative_tokens,
        dtype=experiment.dtype,
        tasks=partition.num_clusters or partition.max_clusters,
        rank=0 if "full" in experiment.align.specialists else experiment.align.rank,
        drafters=3 if experiment.align.trunk else 2,
    )


def memory_of(experiment: Experiment) -> int | None:
    """Bytes of a device: what the experiment says, else what the device says."""
    given = experiment.mesh.memory
    return plan.device_memory() if given is None else int(given * GIB)


def shape_of(model: str) -> LMConfig:
    """The shape of a model folder, or of a published model by its name."""
    if model in PUBLISHED and not Path(model).exists():
        return PUBLISHED[model]
    if not Path(model, "config.json").exists():
        raise UserError(f"{model!r} is neither a model folder nor one of {', '.join(PUBLISHED)}; give one of them")
    return read_config(model)


if __name__ == "__main__":
    command_line(Experiment, run)
