"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

PEFT stores A as `[r, in]` and B as `[out, r]` and scales by alpha / r; a bank has both transposed and the scale in B.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxspec.adapters import PROJECTIONS, Bank

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}


def write_adapter(folder: Path, bank: Bank, task: int, base: str) -> None:
    """One task's adapter, of scale 1, for the model in the folder `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, updates in enumerate(bank):
        for name, (a, b) in updates.items():
            for letter, leaf in (("A", a), ("B", b)):
                tensors[_name(layer, name, letter)] = np.ascontiguousarray(np.asarray(leaf[task], np.float32).T)
    save_file(tensors, str(folder / TENSORS), metadata={"format": "pt"})
    rank = bank[0]["q"][0].shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name}_proj" for name in _projections()],
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _projections():
    return (name for names in PROJECTIONS.values() for name in names)


def _name(layer: int, name: str, letter: str) -> str:
    block = next(BLOCKS[block] for block, names in PROJECTIONS.items() if name in names)
    return f"base_model.model.model.layers.{layer}.{block}.{name}_proj.lora_{letter}.weight"
