"""Trains the demo's tokenizer, target and base drafter from scratch, as two Hugging Face Llama folders.

The target learns the tasks well. The drafter sees few steps of the same mixture: it knows the language of the log and
each task only roughly, which is where speculative decoding usually starts. What `configs/demo` holds came from

    nice -n 10 python -m train.pretrain --out configs/demo
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from jaxspec.config import command_line, plain
from jaxspec.store.huggingface import read_model, write_model
from jaxspec.store.stages import write_json
from jaxspec.transformer import LMConfig, forward, init, unembed
from train.families import FAMILIES, rows

POSITIONS = 1024
PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The shape of one model and how long it learns."""

    layers: int
    width: int
    heads: int
    """Query heads of 32 each; half as many heads hold keys and values."""
    mlp_width: int
    steps: int
    """Optimiser steps."""
    learning_rate: float
    """Peak, after a warm-up of a twentieth of the steps and before a cosine to nothing."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """What is drawn, and the two models made of it."""

    out: str = "configs/demo"
    """Folder for `target`, `draft` and the record of the run."""
    seed: int = 0
    """Seed of rows, order and initial parameters."""
    vocabulary: int = 1024
    """Entries of the tokenizer, special ones included."""
    rows_per_family: int = 12_000
    """Training rows drawn of each task."""
    eval_rows: int = 64
    """Eval rows of each task that the figures are taken from."""
    batch: int = 16
    """Packed sequences in a step."""
    row_tokens: int = 256
    """Tokens in a packed sequence."""
    target: Recipe = Recipe(layers=10, width=128, heads=4, mlp_width=352, steps=1800, learning_rate=3e-3)
    draft: Recipe = Recipe(layers=1, width=64, heads=2, mlp_width=192, steps=200, learning_rate=5e-3)


class Packed(NamedTuple):
    """Whole documents side by side: tokens, their document, and the loss weight of each token's successor, `[R, T]`."""

    tokens: np.ndarray
    segments: np.ndarray
    weights: np.ndarray


def run(config: Pretrain) -> None:
    """Makes the tokenizer and both models, writes their folders and a record with the figures."""
    started, out = time.time(), Path(config.out)
    texts = _texts(config, "train", config.rows_per_family)
    tokenizer = _tokenizer([text for own in texts.values() for text in own], config.vocabulary)
    documents = [ids for own in texts.values() for ids in _encode(tokenizer, own)]
    order = np.random.default_rng(config.seed).permutation(len(documents))
    packed = pack([documents[i] for i in order], config.row_tokens)
    losses = {}
    for name, recipe in (("target", config.target), ("draft", config.draft)):
        lm = _shape(recipe, config.vocabulary)
        params, losses[name] = train(lm, recipe, packed, batch=config.batch, seed=config.seed, name=name)
        _write(out / name, lm, params, tokenizer)
    figures = measure(config, tokenizer)
    write_json(out / "pretrain.json", {
        "config": plain(config), "minutes": round((time.time() - started) / 60, 1), "loss": losses, "eval": figures,
    })  # fmt: skip


def pack(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Lays documents into rows of `length` tokens, each into the first of the newest rows that has room for it."""
    shelves, room = [], []
    for document in documents:
        newest = range(max(0, len(room) - 16), len(room))
        at = next((i for i in newest if room[i] >= len(document)), len(room))
        if at == len(room):
            shelves.append([])
            room.append(length)
        shelves[at].append(document)
        room[at] -= len(document)
    return _lay(shelves, length)


def train(lm: LMConfig, recipe: Recipe, packed: Packed, *, batch: int, seed: int, name: str) -> tuple[dict, float]:
    """Fits a model to the responses with AdamW; returns parameters and the mean loss (nats) of the last 50 steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.steps // 20, recipe.steps, recipe.learning_rate / 100
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    params = init(lm, jax.random.key(seed))
    state, step, losses = tx.init(params), _step(lm, tx), []
    bar = tqdm(_batches(packed, batch, recipe.steps, seed), total=recipe.steps, desc=name, unit="step")
    for rows_of_step in bar:
        params, state, loss = step(params, state, rows_of_step)
        losses.append(loss)
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return params, float(np.mean(losses[-50:]))


def measure(config: Pretrain, tokenizer) -> dict[str, dict[str, float]]:
    """Teacher-forced figures of the written models on eval responses, one set a family.

    Returns:
        Per family: losses (nats a token), the target's argmax accuracy, the share of responses that its argmax has
        right throughout, how often the drafter's argmax is the target's, and the mean tokens of a response.
    """
    both = [read_model(str(Path(config.out, name))) for name in ("target", "draft")]
    predict = [jax.jit(lambda params, tokens, lm=m.config: _log_p(lm, params, tokens)) for m in both]
    figures = {}
    for family, texts in _texts(config, "eval", config.eval_rows).items():
        alone = _lay([[ids] for ids in _encode(tokenizer, texts)], config.row_tokens)
        target, draft = (np.asarray(f(m.params, alone.tokens)) for f, m in zip(predict, both, strict=True))
        figures[family] = _figures(target, draft, alone)
        print(f"{family:12}" + "".join(f"  {name} {value:.3f}" for name, value in figures[family].items()))
    return figures


def _texts(config: Pretrain, split: str, count: int) -> dict[str, list[str]]:
    write = "<bos><user>{prompt}<assistant>{response}<eos>".format_map
    return {f: [write(row) for row in rows(f, count=count, seed=config.seed, split=split)] for f in FAMILIES}


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits apart, so that sums can be learnt digit by digit."""
    bpe = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    bpe.decoder = decoders.ByteLevel()
    settings = {"vocab_size": vocabulary, "special_tokens": SPECIALS, "initial_alphabet": bytes_.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    named = dict(
        zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=False), additional_special_tokens=SPECIALS[3:]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, model_max_length=POSITIONS, **named)


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _lay(shelves: list[list], length: int) -> Packed:
    shape = (len(shelves), length)
    packed = Packed(np.full(shape, PAD, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.float32))
    for row, shelf in enumerate(shelves):
        at = 0
        for number, document in enumerate(shelf):
            end = at + len(document)
            packed.tokens[row, at:end] = document
            packed.segments[row, at:end] = number
            packed.weights[row, at + document.index(ASSISTANT) : end - 1] = 1.0
            at = end
    return packed


def _shape(recipe: Recipe, vocabulary: int) -> LMConfig:
    return LMConfig(
        vocab_size=vocabulary, width=recipe.width, num_layers=recipe.layers, num_heads=recipe.heads,
        num_kv_heads=recipe.heads // 2, head_dim=32, mlp_width=recipe.mlp_width, max_positions=POSITIONS,
    )  # fmt: skip


def _batches(packed: Packed, batch: int, steps: int, seed: int) -> Iterator[Packed]:
    draw = np.random.default_rng(seed)
    per_epoch = len(packed.tokens) // batch
    for step in range(steps):
        if step % per_epoch == 0:
            order = draw.permutation(len(packed.tokens))
        chosen = order[step % per_epoch * batch :][:batch]
        yield Packed(*(leaf[chosen] for leaf in packed))


def _step(lm: LMConfig, tx: optax.GradientTransformation):
    def loss(params: dict, packed: Packed) -> Array:
        hidden = forward(lm, params, packed.tokens, segments=packed.segments)
        logits = unembed(lm, params, hidden[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, packed.tokens[:, 1:])
        return jnp.sum(nats * packed.weights[:, :-1]) / jnp.sum(packed.weights)

    @jax.jit
    def step(params: dict, state: optax.OptState, packed: Packed):
        value, gradient = jax.value_and_grad(loss)(params, packed)
        update, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    return step


def _write(folder: Path, lm: LMConfig, params: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    write_model(folder, lm, params, extra=special)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _log_p(lm: LMConfig, params: dict, tokens: Array) -> Array:
    return jax.nn.log_softmax(unembed(lm, params, forward(lm, params, tokens)))


def _figures(target: np.ndarray, draft: np.ndarray, alone: Packed) -> dict[str, float]:
    asked, truth = alone.weights[:, :-1] > 0, alone.tokens[:, 1:]
    right = target.argmax(-1)[:, :-1] == truth
    figures = {
        "target_loss": _nats(target, truth)[asked].mean(),
        "draft_loss": _nats(draft, truth)[asked].mean(),
        "target_accuracy": right[asked].mean(),
        "exact_responses": (right | ~asked).all(-1).mean(),
        "agreement": (target.argmax(-1) == draft.argmax(-1))[:, :-1][asked].mean(),
        "response_tokens": asked.sum(-1).mean(),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def _nats(log_p: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_p[:, :-1], truth[..., None], -1)[..., 0]


if __name__ == "__main__":
    command_line(Pretrain, run)
