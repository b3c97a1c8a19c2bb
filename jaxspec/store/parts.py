"""One output of several processes: each answers its own rows into a part file; the parts in order are the output."""

import fcntl
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from jaxspec.config import UserError
from jaxspec.store.stages import read_json, write_json


def own_rows(number: int, process: int, processes: int) -> range:
    """The rows of `number` that a process answers: one run each, so that parts in order are rows in order."""
    return range(number * process // processes, number * (process + 1) // processes)


def part_file(output: Path, process: int, processes: int) -> Path:
    """Where a process writes: `out.jsonl` -> `out-00000-of-00002.jsonl`; `out.jsonl` itself when it is alone."""
    if processes == 1:
        return output
    return output.with_name(f"{output.stem}-{process:05}-of-{processes:05}{output.suffix}")


def alone(out: IO[bytes], output: Path) -> None:
    """Locks an output that is open, until it is closed.

    Raises:
        UserError: another process writes it.
    """
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is writing {output}; wait for it, or give each of several its own --process"
        ) from error


def same_job(output: Path, settings: dict[str, Any]) -> None:
    """Takes down beside an output what its records depend on; one that was begun otherwise is not gone on with.

    Raises:
        UserError: a setting differs from the one that the output was begun with.
    """
    notes = output.with_name(f"{output.name}.job")
    if output.exists() and output.stat().st_size and notes.exists():
        begun = read_json(notes)
        other = next((name for name in settings if begun.get(name) != settings[name]), None)
        if other is not None:
            raise UserError(
                f"{output} was begun with {other} {begun.get(other)!r}, now it is {settings[other]!r}; "
                "go on with the same settings, or choose another --output"
            )
    write_json(notes, settings)


def unfinished(output: Path, number: int, processes: int) -> list[int]:
    """The processes whose part has not a line a row; a last line without its end does not count."""
    own = lambda process: len(own_rows(number, process, processes))
    return [p for p in range(processes) if _lines(part_file(output, p, processes)) != own(p)]


def merge(output: Path, number: int, processes: int) -> None:
    """Writes the parts of `number` rows into `output`, in order, whole or not at all; the parts stay.

    Raises:
        UserError: a part is not finished.
    """
    if processes == 1:
        return
    missing = unfinished(output, number, processes)
    if missing:
        part = part_file(output, missing[0], processes)
        raise UserError(f"{part} has not all of its lines; start process {missing[0]} of {processes} again")

    # Two processes may end at once, on hosts whose process numbers are the same.
    with NamedTemporaryFile("wb", dir=output.parent, prefix=f".{output.name}.", suffix=".part", delete=False) as out:
        for process in range(processes):
            with open(part_file(output, process, processes), "rb") as part:
                out.writelines(part)
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, part_file(output, 0, processes).stat().st_mode)
    os.replace(out.name, output)


def _lines(file: Path) -> int:
    if not file.exists():
        return 0
    with open(file, "rb") as lines:
        return sum(line.endswith(b"\n") for line in lines)
