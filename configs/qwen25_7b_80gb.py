"""Qwen2.5-7B with Qwen2.5-0.5B as its drafter on one GPU of 80 GB.

Download both into the folders that `target` and `draft` name, or give yours. JAX takes three quarters of a GPU unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. `python -m decode.plan --config` this file prints what it needs.
"""

from jaxspec.config import Align, Experiment, Mesh, Partition, Trace

experiment = Experiment(
    target="Qwen/Qwen2.5-7B",
    draft="Qwen/Qwen2.5-0.5B",
    dtype="bfloat16",
    mesh=Mesh(memory=59.0),  # three quarters of 79 GiB
    trace=Trace(batch=64, max_prompt_tokens=1024, max_new_tokens=256, smallest_bucket=256),
    partition=Partition(max_clusters=8),
    align=Align(rank=32, alpha=32.0, rows=8, row_tokens=1024, learning_rates=(1e-4, 3e-4)),
)
