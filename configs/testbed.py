"""Eight tasks of a real prompt log on two CPU cores, in well under 90 minutes."""

from jaxspec.config import Align, Experiment, Trace

experiment = Experiment(
    include=(
        "math_word",
        "code_translate",
        "text2sql",
        "pseudocode_python",
        "json_slots",
        "translate_en_de",
        "dialogue_state",
        "chat",
    ),
    limit=600,
    trace=Trace(batch=32, max_prompt_tokens=384, use_responses=False),
    align=Align(rank=16),
)
