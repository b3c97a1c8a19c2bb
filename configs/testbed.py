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
    limit=900,
    trace=Trace(batch=16, max_prompt_tokens=384, max_new_tokens=64),
    align=Align(
        rank=64,
        alpha=64.0,
        steps=400,
        rows=2,
        search_steps=40,
        learning_rates=(2e-3, 4e-3),
        full_learning_rates=(5e-4, 1e-3),
    ),
)
