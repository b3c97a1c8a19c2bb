"""The testbed preset on one GPU: the same eight tasks, more of the log, more training, in minutes."""

import dataclasses
import runpy
from pathlib import Path

from jaxspec.config import Align, Calibrate, Trace

_testbed = runpy.run_path(str(Path(__file__).with_name("testbed.py")))["experiment"]

experiment = dataclasses.replace(
    _testbed,
    limit=6000,
    dtype="bfloat16",
    trace=Trace(
        batch=512,
        max_prompt_tokens=512,
        max_new_tokens=96,
        num_speculative_tokens=2,
        smallest_bucket=512,
        texts="target",
    ),
    align=Align(
        rank=64,
        alpha=64.0,
        steps=1500,
        trunk=0.4,
        rows=16,
        search_steps=100,
        checkpoint_every=400,
        learning_rates=(4e-3, 8e-3),
        full_learning_rates=(2e-3, 4e-3),
        specialists=("lora", "full"),
        mixed=("full",),  # LoRA on the base lost to it in every run
    ),
    calibrate=Calibrate(prompts=16, lengths=(0, 2, 4, 6)),
)
