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
        rank=32,
        alpha=32.0,
        steps=200,
        rows=4,
        search_steps=15,
        learning_rates=(2e-3, 5e-3),
        full_learning_rates=(3e-4, 1e-3),
    ),
)
