"""All stages in order: trace, partition, align, router, calibrate. A finished stage is skipped.

python -m train --config configs/testbed.py --target DIR --draft DIR --prompts FILE_OR_FOLDER --out runs/mine
"""

import time

from jaxspec import sharding
from jaxspec.config import Experiment, UserError, command_line
from train import align, calibrate, partition, router, trace


def run(experiment: Experiment) -> None:
    """Runs the pipeline; its result is the pool in `out/pool`."""
    if experiment.distributed:
        raise UserError("--distributed is for train.align alone; run the other stages on one host")
    if experiment.pool:
        raise UserError("--pool is for train.calibrate alone, which calibrates it; leave it out to train another")
    calibrate.check_new(experiment)
    if experiment.mesh.model > 1:  # else what the trace has taken hours for could not be trained on
        align.check(experiment, sharding.abstract_mesh(experiment.mesh.data, experiment.mesh.model))
    for stage in (trace, partition, align, router, calibrate):
        start = time.time()
        stage.run(experiment)
        print(f"{stage.__name__}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    command_line(Experiment, run)
