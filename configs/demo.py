"""The embedded default: eight families of generated prompts, and the two small models shipped in `configs/demo`.

The models were made by `python -m train.pretrain --out configs/demo`.
"""

from pathlib import Path

from jaxspec.config import Align, Calibrate, Experiment, Partition, Router, Trace

_models = Path(__file__).with_name("demo")

experiment = Experiment(
    target=str(_models / "target"),
    draft=str(_models / "draft"),
    limit=90,
    trace=Trace(batch=32, max_prompt_tokens=64, max_new_tokens=80, smallest_bucket=64, texts="target"),
    partition=Partition(max_clusters=8),  # finer ones exist in a generated log, and each costs the demo a drafter
    align=Align(
        rank=32,
        alpha=32.0,
        steps=80,
        trunk=0.5,
        rows=4,
        # Chosen on the calibrate split among (5e-3, 1e-2, 2e-2) and (1e-2, 2e-2); searching again would take half a minute.
        learning_rates=(5e-3,),
        full_learning_rates=(1e-2,),
    ),
    router=Router(steps=300),
    calibrate=Calibrate(lengths=(2, 4), prompts=24, passes=2),
)
