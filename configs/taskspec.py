"""The method of TaskSpec (arXiv 2505.08600) as far as it is known, on the GPU testbed: what jaxspec adds must show against it.

    python -m train --config configs/taskspec.py --target DIR --draft DIR --prompts LOG --out runs/taskspec
    python -m decode.bench --pool runs/mine/pool --rivals taskspec=runs/taskspec/pool --prompts EVAL --json bench.json

Known: the log is replayed with the base drafter, K-means runs over embeddings of prompt, base draft and target output, one
LoRA adapter a cluster is trained on the base so that it says what the target says, and a classifier that sees the prompt
alone gives every prompt to one of them.

Our reading, where nothing is published: the loss is the likelihood of the target's text; the draft length is one number, 4;
the number of clusters is what the silhouette finds, for the four drafters that others report belong to another log and nobody
tells how they were chosen. Embeddings and classifier read the target's hidden states, in place of a MiniLM and a classifier
said to take half a second (`--partition.features encoder --partition.encoder DIR` takes the former). Training is as long as in
`testbed_gpu.py`, and so is the trace the same: copy `trace` from there into `--out` and it is not made again. As in every
pool the base serves a task whose adapter has no more accepted. `mixed` is LoRA too; the paper has no such control.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxspec.config import Partition

_testbed = runpy.run_path(str(Path(__file__).with_name("testbed_gpu.py")))["experiment"]

experiment = dataclasses.replace(
    _testbed,
    partition=Partition(embed="everything"),
    align=dataclasses.replace(
        _testbed.align, divergence="negative_log_likelihood", trunk=0.0, specialists=("lora",), mixed=("lora",)
    ),
    router=dataclasses.replace(_testbed.router, fallback_below=0.0),
    calibrate=dataclasses.replace(_testbed.calibrate, lengths=(4,)),
)
