"""Models and tokenizers as Hugging Face folders: read, checked, written. Nothing in a folder is ever executed."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxspec.config import UserError
from jaxspec.transformer import LMConfig, Rope, abstract

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Model:
    """A model as read, equal to itself alone: `params` are plain dicts of arrays, `stop_tokens` end a completion."""

    config: LMConfig
    params: dict
    path: str
    digest: str
    stop_tokens: tuple[int, ...]


def read_model(path: str, dtype=jnp.float32, shardings: Any = None) -> Model:
    """Loads a decoder-only LM.

    Args:
        shardings: where each parameter lives, a tree of them as of `abstract`; every process then reads no more than
            its own devices hold. None: all of it, on the default device.

    Raises:
        UserError: the folder, a shard or a tensor is missing or damaged, or the architecture is not supported.
    """
    folder = model_folder(path)
    config = read_config(path)
    shapes = abstract(config, dtype)
    where = [None] * len(jax.tree.leaves(shapes)) if shardings is None else jax.tree.leaves(shardings)
    leaves = read_tensors(folder, named_tensors(config, shapes), dtype, where)
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return Model(config, params, str(path), digest(path), _stop_tokens(folder))


def read_config(path: str) -> LMConfig:
    """The shape of the model in a folder; what is not supported is refused by name."""
    folder = model_folder(path)
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type", "unknown")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    for key, harmless in (("quantization_config", None), ("hidden_act", "silu")):
        if raw.get(key, harmless) != harmless:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported; only {harmless!r} is")
    from transformers import AutoConfig

    try:
        return _shape(path, kind, AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for a damaged config
        raise UserError(f"{path}: config.json cannot be understood ({_first_line(error)})") from error


def read_tokenizer(path: str):
    """The folder's tokenizer, by transformers, without remote code."""
    from transformers import AutoTokenizer

    folder = model_folder(path)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path} has no tokenizer (tokenizer.json); copy the model's tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a damaged tokenizer
        raise UserError(f"{path}: the tokenizer cannot be read ({_first_line(error)})") from error


def fingerprint(tokenizer) -> str:
    """Digest of what token ids mean: the vocabulary with its ids. Padding of the model's vocabulary is not in it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_same_tokenizer(target, draft, target_path: str, draft_path: str) -> None:
    """Raises UserError naming the first token id on which two tokenizers differ."""
    a, b = ({i: token for token, i in t.get_vocab().items()} for t in (target, draft))
    for i in sorted(a.keys() | b.keys()):
        if a.get(i) != b.get(i):
            raise UserError(
                f"the tokenizers differ: id {i} is {a.get(i)!r} in {target_path} and {b.get(i)!r} in {draft_path}; "
                "speculative decoding needs a drafter of the target's own tokenizer"
            )


def digest(path: str) -> str:
    """Identity of a model folder: config, and of every safetensors file its size, header and evenly spaced blocks."""
    folder = model_folder(path)
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        total.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as handle:
            for at in sorted({0, *range(0, size, max(BLOCK, size // 64)), max(0, size - BLOCK)}):
                handle.seek(at)
                total.update(handle.read(BLOCK))
    return total.hexdigest()[:16]


def write_model(
    path: str | Path, config: LMConfig, params: dict, *, family: str = "llama", extra: dict | None = None
) -> None:
    """Writes config.json and one bfloat16 model.safetensors that transformers loads."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", config, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params))
    raw = {
        "architectures": [f"{FAMILIES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_parameters(config.rope),
        "tie_word_embeddings": config.tied,
        "dtype": "bfloat16",
        **_family_settings(config, family),
        **(extra or {}),
    }
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def write_tensors(file: Path, config: LMConfig, params: dict) -> None:
    """Parameters under their Hugging Face names, in the type that they have."""
    tensors = {}
    for name, leaf, transpose in named_tensors(config, params):
        value = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(value.T if transpose else value)
    save_file(tensors, str(file), metadata={"format": "pt"})


def read_tensors(
    folder: Path, wanted: Iterable[tuple[str, jax.ShapeDtypeStruct, bool]], dtype, shardings: Iterable = repeat(None)
) -> list[jax.Array]:
    """The tensors that `wanted` names, each with the shape it must have and whether it is stored transposed."""
    where = shards(folder)
    handles, leaves = {}, []
    for (name, leaf, transpose), sharding in zip(wanted, shardings):
        file = where.get(name)
        if file is None:
            raise UserError(
                f"{folder}: tensor {name} is missing; the checkpoint is incomplete or of another architecture"
            )
        if file not in handles:
            handles[file] = _open(file)
        stored = _stored(handles[file], file, name)
        shape = tuple(stored.get_shape())
        shape = shape[::-1] if transpose else shape
        if shape != leaf.shape:
            raise UserError(f"{file}: tensor {name} has shape {shape}, config.json says {leaf.shape}")
        leaves.append(_placed(stored, shape, transpose, dtype, sharding))
    return leaves


def named_tensors(config: LMConfig, params: dict) -> Iterator[tuple[str, Any, bool]]:
    """Pairs every leaf with its Hugging Face name and whether it is stored transposed."""
    place = {
        "attention": "self_attn",
        "mlp": "mlp",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [p.key for p in path]
        transpose = keys[-1] == "kernel"
        ending = "bias" if keys[-1] == "bias" else "weight"
        if keys[0] == "layers":
            _, layer, block, *rest = keys
            inner = [] if len(rest) == 1 else [rest[0] if rest[0].endswith("_norm") else f"{rest[0]}_proj"]
            name = ".".join([f"model.layers.{layer}", place[block], *inner, ending])
        else:
            name = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[keys[0]] + "." + ending
        yield name, leaf, transpose


def shards(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor; a missing shard, a pickle or no checkpoint at all is a UserError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map", {})
        for shard in sorted(set(names.values())):
            if not (folder / shard).exists():
                raise UserError(f"{index} names {shard}, which is not there; copy the missing shard into {folder}")
        return {name: folder / shard for name, shard in names.items()}
    single = folder / "model.safetensors"
    if single.exists():
        return {name: single for name in _open(single).keys()}
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code when opened; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        )
    raise UserError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def model_folder(path: str) -> Path:
    """The folder of a model, which has a config.json."""
    folder = Path(path)
    if not path or not (folder / "config.json").exists():
        raise UserError(f"{str(path)!r} is not a model folder (it has no config.json); give a Hugging Face folder")
    return folder


def read_json(file: Path) -> dict:
    """A JSON file's object; UserError when it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({_first_line(error)}); copy it again") from error


def _shape(path: str, kind: str, raw) -> LMConfig:
    rope = dict(getattr(raw, "rope_parameters", None) or {"rope_type": "default", "rope_theta": raw.rope_theta})
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UserError(f"{path}: rope_type {rope['rope_type']!r} is not supported; default, linear and llama3 are")
    window = getattr(raw, "sliding_window", None)
    kinds = (
        getattr(raw, "layer_types", None)
        or ["sliding_attention" if window and kind == "mistral" else "full_attention"] * raw.num_hidden_layers
    )
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"{path}: layer type {sorted(unknown)[0]!r} is not supported; full and sliding attention are")
    bias = bool(getattr(raw, "attention_bias", False))
    return LMConfig(
        vocab_size=raw.vocab_size,
        width=raw.hidden_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=getattr(raw, "head_dim", None) or raw.hidden_size // raw.num_attention_heads,
        mlp_width=raw.intermediate_size,
        max_positions=raw.max_position_embeddings,
        rope=Rope(
            theta=float(rope.get("rope_theta", 10_000.0)),
            kind=rope.get("rope_type", "default"),
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_positions=int(rope.get("original_max_position_embeddings", raw.max_position_embeddings)),
        ),
        norm_eps=raw.rms_norm_eps,
        tied=bool(raw.tie_word_embeddings),
        qkv_bias=kind == "qwen2" or bias,
        output_bias=kind in ("llama", "qwen3") and bias,
        mlp_bias=bool(getattr(raw, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        windows=tuple(window if k == "sliding_attention" else None for k in kinds) if window else (),
    )


def _rope_parameters(rope: Rope) -> dict:
    raw = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        raw["original_max_position_embeddings"] = rope.original_positions
    return raw


def _family_settings(config: LMConfig, family: str) -> dict:
    windows = [config.window(layer) for layer in range(config.num_layers)]
    window = next((own for own in windows if own is not None), None)
    if family == "mistral":
        return {"sliding_window": window}
    if family == "llama":
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    kinds = ["full_attention" if own is None else "sliding_attention" for own in windows]
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}
    return {**sliding, "attention_bias": config.qkv_bias}


def _open(file: Path):
    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file ({_first_line(error)}); copy it again") from error


def _stored(handle, file: Path, name: str):
    """A tensor on disk, of which ranges can be read."""
    try:
        return handle.get_slice(name)
    except SafetensorError as error:
        raise UserError(f"{file}: tensor {name} cannot be read ({_first_line(error)}); copy the file again") from error


def _placed(stored, shape: tuple[int, ...], transpose: bool, dtype, sharding) -> jax.Array:
    """The tensor as an array of `dtype`; with a sharding, by reading each of its parts once."""

    def part(ranges: tuple[slice, ...]) -> np.ndarray:
        value = _ranged(stored, ranges[::-1] if transpose else ranges)
        return (value.T if transpose else value).astype(dtype)

    whole = tuple(slice(0, size) for size in shape)
    if sharding is None:
        return jnp.asarray(part(whole))
    known = cache(lambda bounds: part(tuple(slice(*own) for own in bounds)))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: known(tuple(own.indices(size)[:2] for own, size in zip(index or (), shape)))
    )


def _ranged(stored, ranges: tuple[slice, ...]) -> np.ndarray:
    return stored[ranges]


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
