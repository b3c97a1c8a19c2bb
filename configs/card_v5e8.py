"""Query and correct on two halves of a TPU v5e-8, one host: the target on a mesh of 1 x 4 chips, its drafter on the other four.

    python -m decode.card --config configs/card_v5e8.py --pool runs/llama/pool --prompts EVAL --json card.json

For a pool as `llama31_8b_v5e8.py` makes it. The drafter is whole on each of its chips, so that four prompts are decoded at a
time, one a chip. By the weights that a chip reads, 4 GB of the target's and 2.5 GB of the drafter's, one or two layers should
hide behind a target call. It has never run: no TPU was at hand. A slice of several hosts needs a job of several processes,
which the command is not.
"""

from decode.settings import Card
from jaxspec.config import Mesh

experiment = Card(
    pool="",
    dtype="bfloat16",
    layers=(1, 2, 4),
    layer_nodes=(8,),
    max_new_tokens=256,
    apart=True,
    mesh=Mesh(data=1, model=4),
    draft_mesh=Mesh(data=4),
)
