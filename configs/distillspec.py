"""DistillSpec's comparison (arXiv 2310.08461) on the GPU testbed: divergences x whose texts, at temperatures 0 and 1.

    python -m train.compare --config configs/distillspec.py --target DIR --draft DIR --prompts LOG --out runs/distillspec

The paper finds that on-policy texts are nearly as good as the target's, that no divergence is best everywhere, and that
distilled drafters are 10 to 45 % faster than the base. Its fixed data are the log's responses here.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxspec.config import Comparison

_testbed = runpy.run_path(str(Path(__file__).with_name("testbed_gpu.py")))["experiment"]
_fields = {own.name: getattr(_testbed, own.name) for own in dataclasses.fields(_testbed)}

experiment = Comparison(
    **_fields
    | {
        "include": ("json_slots", "text2sql", "translate_en_de"),
        "align": dataclasses.replace(
            _testbed.align, steps=600, trunk=0.0, search_steps=60, full_learning_rates=(1e-3, 3e-3)
        ),
        "divergences": ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "negative_log_likelihood"),
        "sources": ("log", "target", "draft", "mix", "on-policy"),
        "outside": ("translate_fr_en",),
    }
)
