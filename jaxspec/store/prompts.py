"""Prompt files: JSON lines, plain or gzipped, one file or a folder of them."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspec.config import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Line:
    """One prompt: `messages` as chat, and what else its line said (`max_new_tokens`, `seed`, `drafter`, ...)."""

    id: str
    messages: list[dict[str, str]]
    response: str | None
    task: str | None
    settings: dict[str, Any]
    source: str

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Fault:
    """A line that is no prompt, and why; it has an id so that a job can answer it with an error."""

    id: str
    source: str
    reason: str


def read_lines(path: str) -> list[Line | Fault]:
    """All lines of a file or folder, faulty ones among them; UserError only when there is nothing to read."""
    found: list[Line | Fault] = []
    for file in _files(path, ()):
        for source, text in _texts(file):
            found.append(_line_or_fault(text, source))
    if not found:
        raise UserError(f"{path} holds no prompts; each line must be a JSON object with `prompt` or `messages`")
    return found


def read_prompts(
    path: str, *, include: Sequence[str] = (), limit: int | None = None, seed: int | None = None
) -> list[Line]:
    """Reads a log.

    Args:
        include: file names without suffix; empty reads every file of a folder.
        limit: lines taken of each file: the first ones, or a sample when `seed` is given.

    Raises:
        UserError: no such file, a line that is not JSON or has no prompt (with its number).
    """
    lines = []
    for file in _files(path, include):
        own = list(_read(file))
        if limit is not None and seed is not None and limit < len(own):
            chosen = random.Random(zlib.crc32(_stem(file).encode()) ^ seed).sample(range(len(own)), limit)
            own = [own[i] for i in sorted(chosen)]
        lines += own[:limit]
    if not lines:
        raise UserError(f"{path} holds no prompts; each line must be a JSON object with `prompt` or `messages`")
    return lines


def parse_line(text: bytes | str, source: str) -> Line:
    """One JSON line; `source` names it in errors."""
    try:
        raw = _json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({error}); write one object a line") from error
    if not isinstance(raw, dict) or not (raw.keys() & {"prompt", "messages"}):
        raise UserError(f'{source} has neither "prompt" nor "messages"; write {{"prompt": "..."}}')
    messages = raw.pop("messages", None) or [{"role": "user", "content": raw.pop("prompt", "")}]
    raw.pop("prompt", None)
    if not isinstance(messages, list) or not all(_is_message(own) for own in messages):
        raise UserError(f'{source}: a prompt is a text, messages a list like [{{"role": "user", "content": "..."}}]')
    if not any(message["content"].strip() for message in messages):
        raise UserError(f"{source}: the prompt is empty; write a text or remove the line")
    for key in ("response", "task"):
        if not isinstance(raw.get(key), str | None):
            raise UserError(f"{source}: {key} {raw[key]!r} is not a text; write one or leave it out")
    take = lambda key: raw.pop(key, None)
    return Line(str(raw.pop("id", source)), messages, take("response"), take("task"), raw, source)


def _json(text: bytes | str) -> Any:
    """The value that is written there; ValueError for halves of characters too, which no record could hold."""
    raw = json.loads(text)
    json.dumps(raw, ensure_ascii=False).encode()
    return raw


def _is_message(own: Any) -> bool:
    return isinstance(own, dict) and all(isinstance(own.get(key), str) for key in ("role", "content"))


def _line_or_fault(text: bytes, source: str) -> Line | Fault:
    try:
        return parse_line(text, source)
    except UserError as error:
        reason = str(error).removeprefix(source).lstrip(": ").removeprefix("is ")
        try:
            named = _json(text).get("id")
        except (ValueError, RecursionError, AttributeError):
            named = None
        return Fault(source if named is None else str(named), source, reason)


def _read(file: Path) -> Iterator[Line]:
    return (parse_line(text, source) for source, text in _texts(file))


def _texts(file: Path) -> Iterator[tuple[str, bytes]]:
    """Non-empty lines with their place."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as handle:
            for number, text in enumerate(handle, 1):
                if text.strip():
                    yield f"{file}, line {number}", text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or pack it again") from error


def _files(path: str, include: Sequence[str]) -> list[Path]:
    root = Path(path)
    if not path or not root.exists():
        raise UserError(
            f"prompts {str(path)!r}: no such file or folder; give a .jsonl or .jsonl.gz file or a folder of them"
        )
    if root.is_file():
        return [root]
    found = {_stem(file): file for file in sorted(root.iterdir()) if file.name.endswith(SUFFIXES)}
    for name in include:
        if name not in found:
            raise UserError(f"{path} has no file {name}.jsonl or {name}.jsonl.gz; it has {', '.join(found) or 'none'}")
    return [found[name] for name in include] if include else list(found.values())


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".jsonl")
