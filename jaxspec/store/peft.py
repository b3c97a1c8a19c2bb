"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

PEFT stores A as `[r, in]` and B as `[out, r]` and scales by alpha / r; a bank has both transposed and the scale in B.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxspec.adapters import PROJECTIONS, Bank, init_bank, scaled
from jaxspec.config import UserError
from jaxspec.store.stages import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
PLAIN = {
    "peft_type": "LORA", "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "fan_in_fan_out": False,
}  # fmt: skip


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


def read_adapter(folder: Path, params: dict) -> Bank:
    """A bank of one task from a PEFT folder, for the model of these parameters; what the adapter leaves out is zero.

    Raises:
        UserError: no PEFT folder, a kind of adapter that is not plain LoRA, a damaged file, another model's shapes.
    """
    config = _config(folder)
    try:
        tensors = load_file(str(folder / TENSORS))
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS} is missing or damaged ({error}); save the adapter again") from error
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)

    def take(layer: int, name: str, letter: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = _name(layer, name, letter)
        found = tensors.pop(name, np.zeros(like.shape[:0:-1], np.float32)).T
        if found.shape != like.shape[1:]:
            raise UserError(
                f"{folder / TENSORS}: {name} is {found.shape[::-1]}, {like.shape[:0:-1]} fits this drafter; "
                "give an adapter of the pool's base drafter"
            )
        return jnp.asarray(found, jnp.float32)[None]

    blank = jax.eval_shape(lambda: init_bank(params, jax.random.key(0), tasks=1, rank=rank))
    bank = [
        {name: (take(layer, name, "A", a), take(layer, name, "B", b)) for name, (a, b) in own.items()}
        for layer, own in enumerate(blank)
    ]
    if tensors:
        raise UserError(
            f"{folder / TENSORS}: {min(tensors)} has no place in this drafter; projections have, in plain LoRA"
        )
    return scaled(bank, scale)


def base_of(folder: Path) -> str | None:
    """The model that a PEFT folder says it belongs on: a path, or a name on a hub."""
    return _config(folder).get("base_model_name_or_path")


def _config(folder: Path) -> dict:
    """What a folder of plain LoRA says of itself."""
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} has no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    config = read_json(folder / CONFIG)
    missing = {"peft_type", "r", "lora_alpha"} - config.keys()
    if missing:
        raise UserError(f"{folder / CONFIG} says nothing of {min(missing)}; save the adapter again with PEFT")
    odd = {name for name, plain in PLAIN.items() if config.get(name) not in (plain, None)}
    if odd:
        name = min(odd)
        raise UserError(
            f"{folder / CONFIG}: {name} {config[name]!r} is not supported, only {PLAIN[name]!r} is; merge it"
        )
    return config


def _projections():
    return (name for names in PROJECTIONS.values() for name in names)


def _name(layer: int, name: str, letter: str) -> str:
    block = next(BLOCKS[block] for block, names in PROJECTIONS.items() if name in names)
    return f"base_model.model.model.layers.{layer}.{block}.{name}_proj.lora_{letter}.weight"
