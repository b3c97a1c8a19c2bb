"""The output of a job, a JSON line a prompt: what it holds already, records in their order, appended and synced as they come.

A job may be killed inside a record, so that a last line without its end is none and is written again.
"""

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from jaxspec.config import UserError
from jaxspec.store.prompts import Fault, Line
from jaxspec.text import Ask, Completion

BEGIN = b'{"id": '  # of every record
UNSAID = ("index", "num_accepted_tokens_per_pos", "features")
SYNC = 1.0  # seconds of records that a power cut may cost


def resume(output: Path, lines: Sequence[Line | Fault], order: str) -> tuple[set[int], int]:
    """Which prompts the output answers already, and where its last whole record ends.

    Raises:
        UserError: the output answers other prompts, or prompts could not be told apart in it.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it first")
    place = {line.id: number for number, line in enumerate(lines)}
    if order == "completed" and len(place) < len(lines):
        twice = next(line for number, line in enumerate(lines) if place[line.id] != number)
        raise UserError(
            f"{twice.source}: the id {twice.id!r} appears again; give each line its own, or use --order input"
        )
    whole = _whole(output) if output.exists() else []
    if len(whole) > len(lines):
        raise UserError(f"{output} has {len(whole)} records for {len(lines)} prompts; it belongs to another input")
    answered = set()
    for number, record in enumerate(whole):
        own = number if order == "input" else place.get(_id_of(record) or "", -1)
        if own < 0 or _id_of(record) != lines[own].id:
            raise UserError(
                f"{output}, line {number + 1} answers another prompt than {lines[number].source}; choose another --output"
            )
        answered.add(own)
    return answered, sum(len(record) + 1 for record in whole)


def written(output: Path, lines: Sequence[Line | Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(prompt's number, record) of an output that could be resumed; of prompts of one id the first comes first."""
    known = defaultdict(list)
    for number, line in enumerate(lines):
        known[line.id].append(number)
    for record in map(json.loads, _whole(output)):
        yield known[record["id"]].pop(0), record


def _whole(output: Path) -> list[bytes]:
    """The lines that have their end."""
    *whole, torn = output.read_bytes().split(b"\n")
    if torn[: len(BEGIN)] != BEGIN[: len(torn)]:
        raise UserError(f"{output} ends with {torn[:40]!r}, which this command did not write; choose another --output")
    return whole


def _id_of(record: bytes) -> str | None:
    """The id of a record, None for a line that is no record of this command."""
    try:
        own = json.loads(record)
        return own["id"] if own.keys() & {"finish_reason", "error"} else None
    except (ValueError, AttributeError, KeyError):
        return None


def in_order(
    lines: Sequence[Line | Fault],
    asks: Sequence[Ask | str],
    todo: Sequence[int],
    completions: Iterator[tuple[int, Completion] | None],
    order: str,
) -> Iterator[dict[str, Any] | None]:
    """Records of the prompts `todo`, in the wanted order; None where time passes without one.

    Args:
        completions: (prompt's number, completion) of those that have requests, as they come; None where rows only went on.
    """
    ready = {i: {"id": lines[i].id, "error": ask} for i in todo if isinstance(ask := asks[i], str)}
    ordered = order == "input"
    waiting = iter(todo)
    following = next(waiting, None)
    for found in completions:
        if found is not None:
            i, completion = found
            ready[i] = _record(lines[i], completion)
        yield None
        for i in list(ready) if not ordered else ():
            yield ready.pop(i)
        while ordered and following in ready:
            yield ready.pop(following)
            following = next(waiting, None)
    yield from (ready.pop(i) for i in sorted(ready))


def _record(line: Line | Fault, completion: Completion) -> dict[str, Any]:
    own = {name: value for name, value in vars(completion).items() if name not in UNSAID and value is not None}
    return {"id": line.id, **own}


@contextmanager
def preemptible():
    """Yields a function that tells whether SIGTERM, the notice of a preemption, has come."""
    notices: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: notices.append(number))
    try:
        yield lambda: bool(notices)
    finally:
        signal.signal(signal.SIGTERM, before)


def write(
    out: IO[bytes], records: Iterator[dict[str, Any] | None], total: int, done: int, preempted: Callable[[], bool]
) -> int:
    """Appends records, synced every SYNC seconds and at the end; returns how many prompts the output answers."""
    accepted = drafted = tokens = 0
    synced = time.monotonic()
    with tqdm(total=total, initial=done, desc="generate", unit="prompt") as bar:
        for record in records:
            if record is not None:
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                done += 1
                tokens += len(record.get("token_ids", ()))
                accepted += record.get("num_accepted_tokens", 0)
                drafted += record.get("num_draft_tokens", 0)
                bar.update()
            now = time.monotonic()
            if now - synced > SYNC or preempted():
                _sync(out)
                synced = now
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix({"tokens/s": f"{rate:.0f}", "accepted": f"{accepted / max(drafted, 1):.2f}"})
            if preempted():
                break
        _sync(out)
    return done


def _sync(out: IO[bytes]) -> None:
    out.flush()
    os.fsync(out.fileno())
