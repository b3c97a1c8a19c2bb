"""Trains the demo's tokenizer, target and base drafter from scratch, as two Hugging Face Llama folders.

The target learns the tasks well. The drafter sees few steps of the same mixture: it knows the language of the log and
each task only roughly, which is where speculative decoding usually starts. What `configs/demo` holds came from

    python -m train.pretrain --out configs/demo

on one H100 with a second such run at its side, in `minutes` of `pretrain.json`. The target is deep and narrow: at batch 1
depth is what a token costs, and width what weights weigh.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from jaxspec.config import command_line, plain
from jaxspec.packing import packed_rows
from jaxspec.store.huggingface import read_model, write_model
from jaxspec.store.stages import write_json
from jaxspec.transformer import LMConfig, forward, init, unembed
from train.families import FAMILIES, rows

MODELS = ("target", "draft")
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
    target: Recipe = Recipe(layers=16, width=112, heads=4, mlp_width=288, steps=2500, learning_rate=3e-3)
    draft: Recipe = Recipe(layers=1, width=48, heads=2, mlp_width=128, steps=80, learning_rate=5e-3)


class Packed(NamedTuple):
    """Whole documents side by side: tokens, their document, and the loss weight of each token's successor, `[R, T]`."""

    tokens: Any
    segments: Any
    weights: Any


def run(config: Pretrain) -> None:
    """Makes the tokenizer and both models, writes their folders and a record with the figures."""
    started, out = time.time(), Path(config.out)
    texts = _texts(config, "train", config.rows_per_family)
    tokenizer = _tokenizer([text for own in texts.values() for text in own], config.vocabulary)
    documents = [ids for own in texts.values() for ids in _encode(tokenizer, own)]
    losses = {}
    for name in MODELS:
        lm, params, losses[name] = train(config, name, documents)
        _write(out / name, lm, params, tokenizer)
    figures = measure(config, tokenizer)
    write_json(out / "pretrain.json", {
        "config": plain(config), "minutes": round((time.time() - started) / 60, 1), "loss": losses, "eval": figures,
    })  # fmt: skip


def train(config: Pretrain, name: str, documents: Sequence[Sequence[int]]) -> tuple[LMConfig, dict, float]:
    """Fits one model to the responses with AdamW; returns it and its mean loss (nats) over the last 50 steps."""
    recipe = getattr(config, name)
    steps, rate = recipe.steps, recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 100)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    lm = _shape(recipe, config.vocabulary)
    params = start(lm, config.seed)
    state, step, losses = tx.init(params), _step(lm, tx), []
    lengths, everything = [len(document) for document in documents], np.arange(len(documents))
    shelves = packed_rows(lengths, everything, steps * config.batch, config.row_tokens, config.seed)
    bar = tqdm(range(steps), desc=name, unit="step")
    for number in bar:
        own = shelves[number * config.batch :][: config.batch]
        packed = _lay([[documents[i] for i in shelf] for shelf in own], config.row_tokens)
        params, state, loss = step(params, state, packed)
        losses.append(loss)
        if number % 20 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return lm, params, float(np.mean(losses[-50:]))


def start(lm: LMConfig, seed: int) -> dict:
    """Fresh parameters for a narrow model: layers of unit gain, embeddings of standard deviation 0.1.

    `init` draws with 0.02, which suits wide models. At a width of 128 attention then hardly acts: after 1,600 steps
    the target still did not copy a city from the prompt.
    """

    def widen(path, leaf: Array) -> Array:
        gain = {"kernel": 50.0 / leaf.shape[0] ** 0.5, "embedding": 5.0}
        return leaf * gain.get(path[-1].key, 1.0)

    return jax.tree.map_with_path(widen, init(lm, jax.random.key(seed)))


def measure(config: Pretrain, tokenizer) -> dict[str, dict[str, float]]:
    """Teacher-forced figures of the written models on eval responses, one set a family.

    Returns:
        Per family: losses (nats a token), the target's argmax accuracy, the share of responses that its argmax has
        right throughout, how often the drafter's argmax is the target's, and the mean tokens of a response.
    """
    both = [read_model(str(Path(config.out, name))) for name in MODELS]
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


def _lay(shelves: Sequence[Sequence[Sequence[int]]], length: int) -> Packed:
    """Rows of `length` tokens from the documents of each; a response's tokens and its end weigh 1, all others 0."""
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
