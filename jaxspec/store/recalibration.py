"""A pool on another device than it was calibrated on: what it is calibrated by there, and who is told.

What drafters have accepted is read off texts of the calibrate split, and rounds are timed on some of their prompts. A pool
keeps a sample of these texts as token ids, so that it can be calibrated where the log and the trace are not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.config import UserError
from jaxspec.store.stages import device_in_use, read_fields, write_arrays
from jaxspec.store.traces import Texts, Traces

SAMPLE = "sample.npz"
FIELDS = {"tokens", "length", "prompt_length", "best", "task", "number", "tasks"}


class Sample(NamedTuple):
    """N texts of the calibrate split.

    texts: prompts and outputs with the target's law at temperature 0, which is certain of its best token: k is 1.
    task: `[N]`; number: `[N]` lines of the log, which name the random streams; tasks: how many there are.
    """

    texts: Texts
    task: np.ndarray
    number: np.ndarray
    tasks: int

    def of_each(self, most: int) -> list[list[int]]:
        """The first texts of each task, as indices."""
        return [np.flatnonzero(self.task == t)[:most].tolist() for t in range(self.tasks)]


def sampled(traces: Traces, partition: Mapping[str, np.ndarray], most: int) -> Sample:
    """The first texts of each task in the calibrate split, at most so many, in the order of the log.

    Args:
        partition: the split and the task of every text, see `train.partition`.
    """
    tasks, held = len(partition["centroids"]), partition["split"] == 1
    each = [np.flatnonzero(held & (partition["task"] == t))[:most] for t in range(tasks)]
    rows = np.sort(np.concatenate(each))
    tokens, prompt_length = [traces.tokens[i] for i in rows], traces.prompt_length[rows]
    return Sample(_certain(tokens, prompt_length, traces.top_ids[rows, :, 0]), partition["task"][rows], rows, tasks)


def write_sample(folder: Path, sample: Sample) -> None:
    """Writes the sample into a pool's folder: ragged columns one after another, compressed."""
    texts = sample.texts
    answered = np.arange(texts.top_ids.shape[1]) < _answered(texts)[:, None]
    arrays = {
        "tokens": np.concatenate(texts.tokens),
        "length": np.array([len(own) for own in texts.tokens]),
        "prompt_length": texts.prompt_length,
        "best": texts.top_ids[..., 0][answered],
        "task": sample.task,
        "number": sample.number,
        "tasks": np.array(sample.tasks),
    }
    write_arrays(folder / SAMPLE, arrays, np.savez_compressed)


def read_sample(folder: Path) -> Sample:
    """The sample that a pool keeps; UserError for a pool of an earlier version, or a damaged file."""
    again = "move it away and run `python -m train.calibrate` again where the stages are that it was made from"
    if not (folder / SAMPLE).exists():
        raise UserError(
            f"{folder} was made by an earlier version and has no {SAMPLE} to be calibrated by; {again}, which keeps one"
        )
    arrays = read_fields(folder / SAMPLE, FIELDS, again)
    length, prompt_length = arrays["length"], arrays["prompt_length"]
    tokens = np.split(arrays["tokens"], np.cumsum(length)[:-1])
    best = np.zeros((len(length), int((length - prompt_length).max(initial=0))), np.int32)
    best[np.arange(best.shape[1]) < (length - prompt_length)[:, None]] = arrays["best"]
    texts = _certain(tokens, prompt_length, best)
    return Sample(texts, arrays["task"], arrays["number"], int(arrays["tasks"]))


def elsewhere(facts: Mapping[str, Any], path: str) -> str | None:
    """One sentence where the device in use is another than calibration's; a pool that does not say which it was passes."""
    was, now = facts["calibrated"]["device"], device_in_use()
    if was is None or all(was[name] == now[name] for name in ("platform", "kind")):
        return None
    return (
        f"{path} was calibrated on {was['kind']} ({was['platform']}), this is {now['kind']} ({now['platform']}): how many "
        f"tokens pay may differ; `python -m train.calibrate --pool {path} --out OUT` measures it here and writes OUT/pool"
    )


def _answered(texts: Texts) -> np.ndarray:
    return np.array([len(own) for own in texts.tokens]) - texts.prompt_length


def _certain(tokens: list[np.ndarray], prompt_length: np.ndarray, best: np.ndarray) -> Texts:
    """Texts with a law that is certain of `best [N, O]`."""
    sure = np.zeros(best.shape, np.float32)
    return Texts(tokens, prompt_length, best[..., None], sure[..., None], sure - np.inf)
