"""The pair that every stage works with: a target and a base drafter of one tokenizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jinja2 import TemplateError

from jaxspec import sharding
from jaxspec.config import UserError
from jaxspec.store.huggingface import (
    Model,
    check_same_tokenizer,
    fingerprint,
    read_config,
    read_model,
    read_tokenizer,
)
from jaxspec.store.prompts import Line
from jaxspec.transformer import abstract


class Pair(NamedTuple):
    """Target, base drafter, their tokenizer and its fingerprint."""

    target: Model
    draft: Model
    tokenizer: Any
    fingerprint: str

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return self.target.stop_tokens

    @property
    def vocab_size(self) -> int:
        return self.target.config.vocab_size

    @property
    def longest(self) -> int:
        """Most positions that both models were made for."""
        return min(self.target.config.max_positions, self.draft.config.max_positions)


def read_pair(target: str, draft: str, dtype: str, mesh: Mesh | None = None) -> Pair:
    """Loads both models, each onto the mesh by its part's rules; UserError when their tokenizers differ.

    Padded vocabularies may differ.
    """
    for flag, path in (("--target", target), ("--draft", draft)):
        if not path:
            raise UserError(f"{flag} is missing; give a Hugging Face folder")
    tokenizer, other = read_tokenizer(target), read_tokenizer(draft)
    check_same_tokenizer(tokenizer, other, target, draft)
    kind = jnp.dtype(dtype)
    models = _read(target, kind, mesh, "target"), _read(draft, kind, mesh, "drafter")
    return Pair(*models, tokenizer, fingerprint(tokenizer))


def with_draft(pair: Pair, draft: str, mesh: Mesh | None = None) -> Pair:
    """The pair's target, whose weights are not read again, with another base drafter of its tokenizer and type."""
    check_same_tokenizer(pair.tokenizer, read_tokenizer(draft), pair.target.path, draft)
    kind = jax.tree.leaves(pair.target.params)[0].dtype
    return pair._replace(draft=_read(draft, kind, mesh, "drafter"))


def _read(path: str, dtype, mesh: Mesh | None, part: str) -> Model:
    if mesh is None:
        return read_model(path, dtype)
    config = read_config(path)
    sharding.check(config, mesh, part=part)
    return read_model(path, dtype, sharding.shardings(sharding.param_specs(abstract(config, dtype), part), mesh))


def encode(tokenizer: Any, line: Line) -> tuple[int, ...]:
    """Token ids of a prompt, through the chat template where the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        text = through_template(tokenizer, line)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer(line.text)["input_ids"])


def through_template(tokenizer: Any, line: Line) -> str:
    """A prompt as text in the chat template, to where the answer begins; UserError where that refuses it."""
    try:
        return tokenizer.apply_chat_template(line.messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"{line.source}: the chat template refuses it ({error}); mend its messages") from error
