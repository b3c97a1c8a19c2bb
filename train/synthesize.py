"""Writes a log of prompts with the target itself: alignment where nobody has kept a log.

    python -m train.synthesize --target DIR --output log.jsonl --number 2000
    python -m train --config configs/testbed.py --target DIR --draft DIR --prompts log.jsonl --out runs/mine

The target goes on from where its chat template begins the user's message, or from the beginning of a text where it has no
template; what it says up to the end of that turn is a prompt. A prompt is kept if the tokenizer reads it back as the very
tokens that were drawn, so that alignment sees what the target said. A killed run goes on where its output ends.
Sources: Magpie, https://arxiv.org/abs/2406.08464, and of learning a distribution of tasks from models alone, there by
inversion, https://arxiv.org/abs/2311.14756.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax.numpy as jnp
from tqdm import tqdm

from jaxspec.config import UserError, command_line, plain
from jaxspec.requests import Request, bucket_of
from jaxspec.store.huggingface import Model, read_model, read_tokenizer
from jaxspec.store.models import encode, through_template
from jaxspec.store.parts import alone, same_job
from jaxspec.store.prompts import Line
from jaxspec.writing import Author

TRIES = 4  # texts drawn for each prompt that is asked for, at most
MESSAGE = "<<message>>"  # stands for what the user says
BEGIN = b'{"id": "synthesized-'  # of every line


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Who writes how many prompts."""

    target: str
    """Hugging Face folder of the target."""
    output: str
    """File for the prompts, a .jsonl; one that holds some already is gone on with."""
    number: int = 2000
    """Prompts."""
    temperature: float = 1.0
    """Sampling temperature: low ones say the likeliest prompts, again and again."""
    min_prompt_tokens: int = 4
    """Shorter messages, in tokens, are left out."""
    max_prompt_tokens: int = 256
    """Where a message that goes on is cut."""
    batch: int = 32
    """Prompts written together."""
    seed: int = 0
    """Seed of sampling; the same seed writes the same prompts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""


class Turn(NamedTuple):
    """The user's turn.

    begin: token ids that the target goes on from; encoded: those that `encode` writes before a message.
    space: what the template puts between them and the message, which tokenizers read with its first word.
    close: text that ends the message, where no special token does.
    """

    begin: tuple[int, ...]
    encoded: tuple[int, ...]
    space: str = ""
    close: str = ""


def run(config: Synthesize) -> None:
    """Appends the prompts that the output lacks."""
    output = Path(config.output)
    _check(config, output)
    model, tokenizer = read_model(config.target, jnp.dtype(config.dtype)), read_tokenizer(config.target)
    turn = turn_of(tokenizer)
    _check_room(config, model, turn)
    draw = drawing(config, model, tokenizer, turn)
    with open(output, "ab") as out:
        alone(out, output)
        texts, following, size = _resume(output)
        settings = {name: value for name, value in plain(config).items() if name not in ("output", "number")}
        same_job(output, settings | {"target": model.digest})
        os.truncate(output, size)
        firsts = range(following - following % config.batch, TRIES * config.number, config.batch)
        _append(config, out, texts, (own for first in firsts for own in enumerate(draw(first), first)))
    if len(texts) < config.number:
        raise UserError(
            f"{output} has {len(texts)} prompts, --number {config.number} were asked for: the rest of {TRIES} times as many "
            "texts were repeats, too short, or are read back as other tokens; raise --temperature or ask for fewer"
        )
    print(f"synthesize: {len(texts)} prompts in {output}")


def _append(config: Synthesize, out: IO[bytes], texts: set[str], drawn: Iterator[tuple[int, str | None]]) -> None:
    """Writes what was drawn by its number until there are enough texts; adds to these."""
    with tqdm(total=config.number, initial=len(texts), desc="synthesize", unit="prompt") as bar:
        while len(texts) < config.number and (found := next(drawn, None)):
            number, text = found
            if text and text not in texts:
                texts.add(text)
                out.write(json.dumps({"id": f"synthesized-{config.seed}-{number}", "prompt": text}).encode() + b"\n")
                out.flush()
                bar.update()


def turn_of(tokenizer: Any) -> Turn:
    """Where the user's message stands in what `encode` writes."""
    if getattr(tokenizer, "chat_template", None):
        before, _, close = through_template(tokenizer, _line(MESSAGE)).partition(MESSAGE)
        text = before.rstrip(" ")
        begin = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return Turn(begin, begin, before[len(text) :], close)
    encoded = tuple(tokenizer("")["input_ids"])
    start = next((own for own in (tokenizer.bos_token_id, tokenizer.eos_token_id) if own is not None), None)
    return Turn(encoded or (() if start is None else (start,)), encoded)


def drawing(config: Synthesize, model: Model, tokenizer: Any, turn: Turn) -> Callable[[int], list[str | None]]:
    """number of the first -> a batch of prompts, None for texts that will not do."""
    special = {own for own, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops = {*model.stop_tokens, *special}
    author = Author(
        model.config,
        vocab_size=min(model.config.vocab_size, len(tokenizer)),
        stop_tokens=sorted(stops),
        rows=config.batch,
        bucket=bucket_of(len(turn.begin)),
        most=config.max_prompt_tokens,
        sampled=True,
        dtype=jnp.dtype(config.dtype),
    )
    settings = {"max_new_tokens": config.max_prompt_tokens, "seed": config.seed, "temperature": config.temperature}

    def draw(first: int) -> list[str | None]:
        numbers = range(first, first + config.batch)
        said = author.answers(model.params, [Request(ids=turn.begin, number=n, **settings) for n in numbers])
        return [_prompt(config, tokenizer, turn, own[:-1] if own[-1] in stops else own) for own in said]

    return draw


def _prompt(config: Synthesize, tokenizer: Any, turn: Turn, said: list[int]) -> str | None:
    """The message that the tokens say, if it is long enough and `encode` reads it as these tokens."""
    text = tokenizer.decode(said, clean_up_tokenization_spaces=False).removeprefix(turn.space)
    text = text.partition(turn.close)[0] if turn.close else text
    if not text.strip() or len(tokenizer(text, add_special_tokens=False)["input_ids"]) < config.min_prompt_tokens:
        return None
    ids = encode(tokenizer, _line(text))
    return text if all(own == drawn for own, drawn in zip(ids, (*turn.encoded, *said), strict=False)) else None


def _line(message: str) -> Line:
    return Line("", [{"role": "user", "content": message}], None, None, {}, "the user's message")


def _check(config: Synthesize, output: Path) -> None:
    if not config.target:
        raise UserError("--target is missing; give a Hugging Face folder")
    if not output.name.endswith(".jsonl") or not output.parent.is_dir():
        raise UserError(f"--output {output} will not do; give a .jsonl file in a folder that exists")
    if config.temperature == 0:
        raise UserError("--temperature 0 writes one prompt again and again; give a number above 0")
    if config.min_prompt_tokens > config.max_prompt_tokens:
        raise UserError(
            f"--min-prompt-tokens {config.min_prompt_tokens} exceeds --max-prompt-tokens {config.max_prompt_tokens}; "
            "lower it"
        )


def _check_room(config: Synthesize, model: Model, turn: Turn) -> None:
    if not turn.begin:
        raise UserError(f"--target {config.target} has no token that begins a text; give a model with a chat template")
    room = model.config.max_positions - len(turn.begin)
    if config.max_prompt_tokens > room:
        raise UserError(
            f"--max-prompt-tokens {config.max_prompt_tokens} exceeds the target's positions; give at most {room}"
        )


def _resume(output: Path) -> tuple[set[str], int, int]:
    """The prompts that are written already, the number of the text to be drawn next, and where the last whole line ends."""
    *lines, torn = output.read_bytes().split(b"\n")
    strange = next((own for own in lines if not own.startswith(BEGIN)), None)
    strange = torn if strange is None and torn[: len(BEGIN)] != BEGIN[: len(torn)] else strange
    if strange is not None:
        raise UserError(
            f"{output} has the line {strange[:40]!r}, which this command did not write; choose another --output"
        )
    known = [json.loads(line) for line in lines]
    following = int(known[-1]["id"].rpartition("-")[2]) + 1 if known else 0
    return {own["prompt"] for own in known}, following, sum(len(line) + 1 for line in lines)


if __name__ == "__main__":
    command_line(Synthesize, run)
