"""Texts as vectors: a Hugging Face encoder's folder read, and its pooled hidden states of a whole log."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from jaxspec import encoder, transformer
from jaxspec.config import UserError
from jaxspec.encoder import EncoderConfig, mean_pool
from jaxspec.store.huggingface import (
    FAMILIES,
    model_folder,
    named_tensors,
    read_config,
    read_json,
    read_tensors,
    read_tokenizer,
    shards,
)

BERT_FAMILIES = ("bert", "roberta", "xlm-roberta")
PREFIXES = ("", "bert.", "roberta.", "model.")  # encoders are saved bare, language models with their trunk's name
SHORTEST = 32
FULL = 512  # up to this many tokens a batch is full; longer texts share a program in smaller numbers


def embed(texts: Sequence[str], folder: str, *, batch: int = 32) -> np.ndarray:
    """Mean-pooled unit vectors `[N, H]`, float32, of texts cut at the encoder's longest.

    Args:
        folder: a BERT, RoBERTa or XLM-RoBERTa encoder, or a decoder-only model that `read_model` reads, head or none.
        batch: texts in a call of the encoder.

    Raises:
        UserError: the folder is damaged or of another architecture.
    """
    model = _read(folder)
    tokenizer = read_tokenizer(folder)
    ids = _token_ids(tokenizer, texts, model.longest)
    vectors = np.zeros((len(ids), model.config.width), np.float32)
    with tqdm(total=len(ids), desc="embed", unit="text") as bar:
        for rows, tokens, lengths in _batches(ids, model.longest, batch):
            pooled = _pooled(model.hidden, model.config, model.params, tokens, lengths)
            vectors[rows] = np.asarray(pooled)[: len(rows)]
            bar.update(len(rows))
    return vectors


class _Model(NamedTuple):
    """`hidden(config, params, tokens [B, T], lengths [B]) -> [B, T, H]` and what it is called with."""

    hidden: Callable[..., Array]
    config: Any
    params: dict
    longest: int


def _read(folder: str) -> _Model:
    raw = read_json(model_folder(folder) / "config.json")
    kind = raw.get("model_type", "unknown")
    if kind in FAMILIES:
        return _read_decoder(folder)
    if kind not in BERT_FAMILIES:
        known = ", ".join([*BERT_FAMILIES, *sorted(FAMILIES)])
        raise UserError(f"{folder}: model_type {kind!r} is not supported as an encoder; supported are {known}")
    return _read_bert(folder, kind, raw)


def _read_decoder(folder: str) -> _Model:
    config = replace(read_config(folder), tied=True)  # without a head, which no vector passes through
    shapes = transformer.abstract(config)
    params = _read_params(folder, shapes, named_tensors(config, shapes))
    return _Model(_causal, config, params, config.max_positions)


def _causal(config: transformer.LMConfig, params: dict, tokens: Array, lengths: Array) -> Array:
    del lengths  # padding is on the right, where no token of the text looks
    return transformer.forward(config, params, tokens)


def _read_bert(folder: str, kind: str, raw: dict) -> _Model:
    _refuse(folder, raw)
    config = _shape(folder, kind, raw)
    shapes = encoder.abstract(config)
    return _Model(encoder.forward, config, _read_params(folder, shapes, _named_tensors(shapes)), config.longest)


def _refuse(folder: str, raw: dict) -> None:
    activations = tuple(encoder.ACTIVATIONS)
    allowed = {"hidden_act": activations, "position_embedding_type": ("absolute",), "is_decoder": (False,)}
    for name, values in {**allowed, "quantization_config": (None,)}.items():
        if raw.get(name, values[0]) not in values:
            known = " or ".join(repr(value) for value in values)
            raise UserError(f"{folder}: {name}={raw[name]!r} is not supported; it must be {known}")


def _shape(folder: str, kind: str, raw: dict) -> EncoderConfig:
    try:
        return EncoderConfig(
            vocab_size=int(raw["vocab_size"]),
            width=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=int(raw["num_attention_heads"]),
            mlp_width=int(raw["intermediate_size"]),
            num_positions=int(raw["max_position_embeddings"]),
            num_types=int(raw.get("type_vocab_size", 2)),
            norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
            activation=raw.get("hidden_act", "gelu"),
            padding_id=None if kind == "bert" else int(raw.get("pad_token_id", 1)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: config.json cannot be understood ({error!r}); copy it again") from error


def _named_tensors(shapes: dict) -> Iterator[tuple[str, jax.ShapeDtypeStruct, bool]]:
    """Pairs every leaf of a BERT with its bare Hugging Face name and whether it is stored transposed."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = [p.key for p in path]
        yield _name(keys), leaf, keys[-1] == "kernel"


def _name(keys: list) -> str:
    ending = "bias" if keys[-1] == "bias" else "weight"
    if keys[0] == "embed":
        table = {"words": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
        return f"embeddings.{table.get(keys[1], 'LayerNorm')}.{ending}"
    own = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    return f"encoder.layer.{keys[1]}.{own[keys[-2]]}.{ending}"


def _read_params(folder: str, shapes: dict, named: Iterable[tuple[str, jax.ShapeDtypeStruct, bool]]) -> dict:
    stored = shards(Path(folder))
    wanted = ((_stored_name(name, stored), leaf, transpose) for name, leaf, transpose in named)
    return jax.tree.unflatten(jax.tree.structure(shapes), read_tensors(Path(folder), wanted, np.float32))


def _stored_name(name: str, stored: dict[str, Path]) -> str:
    """How this checkpoint calls a tensor: with or without the trunk's prefix, and in BERT's first words for a norm."""
    bare = name.removeprefix("model.")
    old = bare.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    candidates = [prefix + spelt for prefix in PREFIXES for spelt in (bare, old)]
    return next((candidate for candidate in candidates if candidate in stored), name)


def _token_ids(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    # By the tokenizer itself, which keeps the closing special token when it cuts.
    return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"] if len(texts) else []


def _batches(ids: list[list[int]], longest: int, batch: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows of like length, their tokens `[B, T]` and lengths `[B]`; T is one of few and B depends on T alone."""
    padded = np.array([_bucket(len(own), longest) for own in ids])
    for width in np.unique(padded):
        members = np.flatnonzero(padded == width).tolist()
        size = max(1, batch * FULL // max(FULL, int(width)))
        for begin in range(0, len(members), size):
            rows = members[begin : begin + size]
            tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for i, row in enumerate(rows):
                lengths[i] = len(ids[row])
                tokens[i, : lengths[i]] = ids[row]
            yield rows, tokens, lengths


def _bucket(length: int, longest: int) -> int:
    width = SHORTEST
    while width < length:
        width *= 2
    return min(width, longest)


@partial(jax.jit, static_argnums=(0, 1))
def _pooled(hidden: Callable[..., Array], config: Any, params: dict, tokens: Array, lengths: Array) -> Array:
    return mean_pool(hidden(config, params, tokens, lengths), lengths)
