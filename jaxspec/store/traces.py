"""A finished trace in memory: one record a prompt of the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxspec.config import UserError
from jaxspec.store.huggingface import digest
from jaxspec.store.stages import manifest, read_arrays

PARTS = ("prompt", "draft", "output")
SPLITS = ("train", "calibrate", "test")
SHARES = (0.8, 0.9)


class Texts(NamedTuple):
    """N texts that the target has scored, with O output places and k kept probabilities; see `Traces`."""

    tokens: list[npt.NDArray[np.int32]]
    prompt_length: np.ndarray
    top_ids: np.ndarray
    top_log_p: np.ndarray
    tail_log_p: np.ndarray


class Traces(NamedTuple):
    """The log as lines, and what base decoding left of each; N prompts, O output places, k kept probabilities.

    tokens: N arrays of ids, prompt and output; prompt_length `[N]`.
    top_ids, top_log_p `[N, O, k]`, tail_log_p `[N, O]`: the target's distribution before each emitted token.
    draft `[N, O]`: what base proposed there, -1 for nothing; drafted, accepted `[N]` its counts.
    features: unit vectors `[N, H]` of prompt, draft and output.
    """

    log: list[dict]
    tokens: list[npt.NDArray[np.int32]]
    prompt_length: np.ndarray
    top_ids: np.ndarray
    top_log_p: np.ndarray
    tail_log_p: np.ndarray
    draft: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    features: dict[str, np.ndarray]

    def outputs(self) -> Iterator[np.ndarray]:
        return (own[n:] for own, n in zip(self.tokens, self.prompt_length, strict=True))


def split_of(number: int, seed: int) -> np.ndarray:
    """Each prompt's split `[N]`, an index in SPLITS, drawn with the seed."""
    order = np.random.default_rng(seed).permutation(number) / number
    return np.digitize(order, SHARES)


def check_models(out: str, **paths: str) -> None:
    """Raises UserError when a folder, given as `target` or `draft`, is not the model that the trace was made with."""
    parents = manifest(out, "trace")["parents"]
    for name, path in paths.items():
        found = digest(path)
        if found != parents[name]:
            raise UserError(
                f"--{name} {path} is not the {name} of {Path(out, 'trace')}: its digest is {found}, the trace was made "
                f"with {parents[name]}; give that model, or another --out"
            )


def read_traces(out: str) -> Traces:
    """Reads `out/trace`; UserError when it is not finished or a shard is damaged."""
    manifest(out, "trace")
    folder = Path(out, "trace")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shards = [read_arrays(file) for file in sorted(folder.glob("shard-*.npz"))]
    order = np.argsort(np.concatenate([shard["row"] for shard in shards]))
    column = lambda name: np.concatenate([shard[name] for shard in shards])[order]
    tokens = [own[:n] for shard in shards for own, n in zip(shard["tokens"], shard["length"], strict=True)]
    return Traces(
        log=log,
        tokens=[tokens[i] for i in order],
        prompt_length=column("prompt_length"),
        top_ids=column("top_ids"),
        top_log_p=column("top_log_p"),
        tail_log_p=column("tail_log_p"),
        draft=column("draft"),
        drafted=column("drafted"),
        accepted=column("accepted"),
        features={part: column(f"{part}_features") for part in PARTS},
    )
