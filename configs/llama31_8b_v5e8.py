"""Llama-3.1-8B with Llama-3.2-1B as its drafter on the eight chips of a TPU v5e-8.

Download both into the folders that `target` and `draft` name, or give yours. For more rows of shorter prompts take
`--mesh.data 2 --mesh.model 4`. It has never run: no TPU was at hand; `python -m decode.plan --config` this file prints
what it needs. The control is LoRA alone: a full fine-tune of the drafter, float32 with Adam, does not fit beside it.
"""

from jaxspec.config import Align, Experiment, Mesh, Partition, Trace

experiment = Experiment(
    target="meta-llama/Llama-3.1-8B",
    draft="meta-llama/Llama-3.2-1B",
    dtype="bfloat16",
    mesh=Mesh(data=1, model=8, memory=15.75),  # of a chip's 16 GiB, what XLA leaves to programs
    trace=Trace(batch=32, max_prompt_tokens=1024, max_new_tokens=256, smallest_bucket=256),
    partition=Partition(max_clusters=8),
    align=Align(rank=32, alpha=32.0, rows=8, row_tokens=1024, learning_rates=(1e-4, 3e-4), mixed=("lora",)),
)
