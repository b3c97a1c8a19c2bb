"""Direct Alignment's comparison (arXiv 2403.00858) on the GPU testbed: KL, TVD and TVD++ on the target's own responses.

    python -m train.compare --config configs/direct_alignment.py --target DIR --draft DIR --prompts LOG --out runs/direct

The paper finds TVD++ ahead of KL and TVD, up to 2.3 tokens a target call at K = 3, and that on a task outside of what they
were tuned on all fine-tuned drafters are worse than the base. Its task outside is a translation, as here.
"""

import dataclasses
import runpy
from pathlib import Path

_distillspec = runpy.run_path(str(Path(__file__).with_name("distillspec.py")))["experiment"]

experiment = dataclasses.replace(
    _distillspec,
    divergences=("forward_kl", "total_variation", "total_variation_policy"),
    sources=("target",),
    outside=("translate_fr_en", "open_qa"),
)
