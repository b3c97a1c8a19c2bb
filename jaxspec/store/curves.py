"""What training says of itself as it goes: a line a moment in a file, and the curves that the lines make."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxspec.store.stages import is_writer

TRAIN, HELD = "train", "held"
FIELDS = ("loss", "agreement")
Curves = dict[str, dict]


class Log:
    """Appends a run's lines, each at once, so that a killed run has said all that its checkpoint knows.

    Of several processes the first writes.
    """

    def __init__(self, file: Path, course: str):
        self._file = open(file if is_writer() else os.devnull, "a", buffering=1)
        self._course = course

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, step: int, said: Mapping[str, Iterable], split: str = TRAIN) -> None:
        """Loss and agreement of each drafter `[D]` after so many steps, on the rows trained on or on those held out."""
        rounded = {name: [round(float(x), 4) for x in values] for name, values in said.items()}
        self._file.write(json.dumps({"course": self._course, "split": split, "step": step, **rounded}) + "\n")


def read_curves(file: Path) -> Curves:
    """Of every course `step`, and at each of them `loss` and `agreement` of its drafters; and `held`, likewise, if measured."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    key = lambda line: (line["course"], line.get("split", TRAIN), line["step"])
    last = {key(line): line for line in lines}  # a killed run has said some steps twice
    curves: Curves = {}
    for (course, split, _), line in last.items():
        own = curves.setdefault(course, _empty())
        own = own.setdefault(HELD, _empty()) if split == HELD else own
        for name in ("step", *FIELDS):
            own[name].append(line[name])
    return curves


def _empty() -> dict[str, list]:
    return {name: [] for name in ("step", *FIELDS)}
