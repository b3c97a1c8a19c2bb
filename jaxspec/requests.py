"""What is asked and what comes out, as token ids in host memory; and the static shapes that carry them.

Shapes depend on slots, prompt bucket and draft length and on nothing else, so that few programs serve every prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxspec.config import UserError
from jaxspec.metrics import Counts
from jaxspec.sampling import row_key
from jaxspec.types import Prompt, Sampling

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAX_DRAFT = 16  # tokens of the longest chain; every buffer has slack for it, so that all lengths share one state
MAX_NODES = 64  # of the largest tree
# What a prompt's settings may be: their types, whether a value holds, and how a person says it.
SETTINGS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "max_new_tokens": ((int,), lambda x: x >= 1, "a whole number from 1"),
    "temperature": ((int, float), lambda x: 0 <= x < math.inf, "a number from 0"),
    "top_k": ((int, type(None)), lambda x: x is None or x >= 1, "a whole number from 1"),
    "top_p": ((int, float, type(None)), lambda x: x is None or 0 < x <= 1, "a number above 0 and up to 1"),
    "seed": ((int,), lambda x: 0 <= x < 2**31, "a whole number from 0 to 2147483647"),
    "num_speculative_tokens": (
        (int, type(None)),
        lambda x: x is None or 0 <= x <= MAX_DRAFT,
        f"a whole number from 0, which drafts nothing, to {MAX_DRAFT}",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt as token ids, and how to answer it; `number` and `seed` name its random stream.

    route: the drafter that must serve it, None leaves it to the router.
    num_speculative_tokens: which of the engine's programs decodes it, by tokens drafted a round; None leaves it to the router.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    number: int = 0
    seed: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    draft_limit: int = MAX_NODES
    route: int | None = None
    num_speculative_tokens: int | None = None


class Completion(NamedTuple):
    """What came out: token ids with the stop token, `stop` or `length`, and the row's counts.

    route: who drafted, -1 the base; num_speculative_tokens: tokens drafted a round by the program that it had.
    task, confidence: the router's likeliest task and how likely it was.
    features: `[H]` the target's pooled prefill states; record: what the recorder gathered of the row.
    """

    ids: list[int]
    finish_reason: str
    counts: Counts
    route: int
    num_speculative_tokens: int
    task: int
    confidence: float
    features: np.ndarray
    record: Any


def checked(name: str, value: Any) -> Any:
    """The value of one of `SETTINGS`, or a UserError that says what it may be."""
    kinds, holds, wanted = SETTINGS[name]
    if type(value) not in kinds or not holds(value):
        raise UserError(f"{name} {value!r} will not do; give {wanted}")
    return value


def bucket_of(length: int, smallest: int = BUCKETS[0]) -> int:
    """The smallest prompt bucket, from `smallest` on, that holds `length` tokens."""
    need = max(length, smallest)
    return next((size for size in BUCKETS if size >= need), -(-need // BUCKETS[-1]) * BUCKETS[-1])


def slack(num_nodes: int = MAX_DRAFT) -> int:
    """Tokens of a slot that the window behind a text may take, whatever it drafts up to the longest chain or so many nodes."""
    return max(num_nodes, MAX_DRAFT) + 1


def room_of(bucket: int, max_new_tokens: int, num_nodes: int = MAX_DRAFT) -> int:
    """Tokens that a slot holds: prompt, budget and slack, so that no write can ever be clamped."""
    return -(-(bucket + max_new_tokens + slack(num_nodes)) // 16) * 16


def as_prompt(requests: Sequence[Request], rows: int, bucket: int, routes: Sequence[int]) -> Prompt:
    """Arrays `[rows, bucket]` of requests that fit the bucket; missing rows are padded with ones that emit nothing."""
    filler = Request(ids=(0,), max_new_tokens=0)
    padded = [*requests, *[filler] * (rows - len(requests))]
    of: Callable[..., Any] = lambda get: np.array([get(r) for r in padded], np.int32)
    route: Any = np.array([*routes, *[-1] * (rows - len(routes))], np.int32)
    keys = _keys(of(lambda r: r.seed), of(lambda r: r.number))
    return Prompt(
        tokens=as_tokens(padded, bucket),
        length=of(lambda r: len(r.ids)),
        key=keys,
        limit=of(lambda r: r.max_new_tokens),
        draft_limit=of(lambda r: r.draft_limit),
        route=route,
    )


def as_tokens(requests: Sequence[Request], bucket: int) -> Any:
    """Right-padded prompts `[rows, bucket]`."""
    tokens = np.zeros((len(requests), bucket), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.ids)] = request.ids
    return tokens


def as_sampling(requests: Sequence[Request], rows: int, vocab_size: int) -> Sampling:
    """Rows' sampling, every column present, so that requests of all settings share a program."""
    pad: Callable[..., Any] = lambda values, fill, dtype: np.array([*values, *[fill] * (rows - len(requests))], dtype)
    return Sampling(
        pad([r.temperature for r in requests], 0.0, np.float32),
        pad([min(r.top_k or vocab_size, vocab_size) for r in requests], vocab_size, np.int32),
        pad([1.0 if r.top_p is None else r.top_p for r in requests], 1.0, np.float32),
    )


@jax.jit
def _keys(seeds: Array, numbers: Array) -> Array:
    return jax.vmap(row_key)(seeds, numbers)
