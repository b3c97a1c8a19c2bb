"""From token ids in host memory to completions there: bucketed batches through two compiled programs.

`prefill` reads the prompts with the target and pools the router's features; `decode` reads them with the drafter and
stays on the device until every row has ended. Shapes depend on batch, prompt bucket and draft length, on nothing else.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.metrics import Counts, count, no_counts, up_to_the_end
from jaxspec.sampling import row_key
from jaxspec.speculate import run, speculator
from jaxspec.types import Drafter, Prompt, Sampling, SpecInfo, SpecParams, Target

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAX_DRAFT = 16  # slack in every buffer, so that programs of all draft lengths share one prefill


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt as token ids, and how to answer it; `number` and `seed` name its random stream."""

    ids: tuple[int, ...]
    max_new_tokens: int
    number: int = 0
    seed: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    draft_limit: int = MAX_DRAFT


class Completion(NamedTuple):
    """What came out: token ids with the stop token, `stop` or `length`, and the row's counts."""

    ids: list[int]
    finish_reason: str
    counts: Counts


class Decoder(NamedTuple):
    """Two jitted programs.

    prefill: (target params, tokens `[B, P]`, length `[B]`, slots) -> (target state, features `[B, H]`).
    decode: (params, prompt, target state, sampling, slots) -> (tokens `[B, L]`, length, stopped, counts, record).
    """

    num_nodes: int
    prefill: Callable
    decode: Callable


class Recorder(NamedTuple):
    """What else is gathered of every round.

    init: (prompt) -> record, rows first.
    fold: (record, info) -> record.
    """

    init: Callable[[Prompt], Any]
    fold: Callable[[Any, SpecInfo], Any]


NOTHING = Recorder(lambda prompt: (), lambda record, info: record)


def decoder(
    target: Target,
    drafter: Drafter,
    law: Callable,
    *,
    stop_tokens: Sequence[int],
    recorder: Recorder = NOTHING,
) -> Decoder:
    """The two programs of one way of decoding; nothing is compiled before the first batch."""
    spec = speculator(target, drafter, law, stop_tokens=stop_tokens)

    @partial(jax.jit, static_argnames="slots")
    def prefill(params, tokens, length, slots):
        batch = tokens.shape[0]
        none = jnp.zeros(batch, jnp.int32)
        prompt = Prompt(tokens, length, jax.random.split(jax.random.key(0), batch), none, none, none)
        state, features = target.init(params, prompt, slots)
        return state, pool_features(features, length)

    @partial(jax.jit, static_argnames="slots")
    def decode(params, prompt, target_state, sampling, slots):
        state = spec.init(params, prompt, target_state, sampling, slots)
        start = no_counts(prompt.length.shape[0], drafter.num_nodes), recorder.init(prompt)
        fold = lambda stats, info: (count(stats[0], info), recorder.fold(stats[1], info))
        state, (counts, record) = run(spec.step, fold, params, state, start)
        return state.tokens, state.length, state.stopped, up_to_the_end(counts, state.length), record

    return Decoder(drafter.num_nodes, prefill, decode)


def pool_features(hidden: Array, length: Array) -> Array:
    """Mean over the real tokens, normalised to unit length: `[B, P, H]` -> `[B, H]` float32."""
    real = (jnp.arange(hidden.shape[1]) < length[:, None])[..., None]
    mean = jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0.0), axis=1) / length[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)


def bucket_of(length: int, smallest: int = BUCKETS[0]) -> int:
    """The smallest prompt bucket, from `smallest` on, that holds `length` tokens."""
    need = max(length, smallest)
    return next((size for size in BUCKETS if size >= need), -(-need // BUCKETS[-1]) * BUCKETS[-1])


def slots_of(bucket: int, max_new_tokens: int) -> int:
    """Token buffer and cache length: prompt, budget and slack, so that no write can ever be clamped."""
    return -(-(bucket + max_new_tokens + MAX_DRAFT + 1) // 16) * 16


def group(requests: Sequence[Request], batch: int, smallest: int = BUCKETS[0]) -> list[list[int]]:
    """Indices in batches of at most `batch` rows, each of one prompt bucket, in order of arrival within it."""
    by_bucket: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        by_bucket.setdefault(bucket_of(len(request.ids), smallest), []).append(i)
    return [rows[at : at + batch] for _, rows in sorted(by_bucket.items()) for at in range(0, len(rows), batch)]


def as_prompt(requests: Sequence[Request], batch: int, smallest: int = BUCKETS[0]) -> Prompt:
    """Device arrays of one batch; missing rows are padded with requests that emit nothing."""
    filler = Request(ids=(0,), max_new_tokens=0)
    rows = [*requests, *[filler] * (batch - len(requests))]
    tokens = np.zeros((batch, bucket_of(max(len(r.ids) for r in rows), smallest)), np.int32)
    for i, request in enumerate(rows):
        tokens[i, : len(request.ids)] = request.ids
    of = lambda get: np.array([get(r) for r in rows], np.int32)
    keys = _keys(of(lambda r: r.seed), of(lambda r: r.number))
    length, limit = of(lambda r: len(r.ids)), of(lambda r: r.max_new_tokens)
    return Prompt(jnp.asarray(tokens), length, keys, limit, of(lambda r: r.draft_limit), np.full(batch, -1, np.int32))


def as_sampling(requests: Sequence[Request], batch: int, vocab_size: int) -> Sampling | None:
    """Rows' sampling; None when all are greedy, and no top-k or top-p column when none asks for it."""
    if all(r.temperature == 0 for r in requests):
        return None
    pad = lambda values, fill, dtype: np.array([*values, *[fill] * (batch - len(requests))], dtype)
    top_k = any(r.top_k for r in requests)
    top_p = any(r.top_p is not None and r.top_p < 1 for r in requests)
    return Sampling(
        pad([r.temperature for r in requests], 0.0, np.float32),
        pad([r.top_k or vocab_size for r in requests], vocab_size, np.int32) if top_k else None,
        pad([1.0 if r.top_p is None else r.top_p for r in requests], 1.0, np.float32) if top_p else None,
    )


class Timed(NamedTuple):
    """A batch's completions, its rows' routes, and seconds of prefill (routing apart), routing and decoding."""

    completions: list[Completion]
    route: np.ndarray
    prefill_seconds: float
    route_seconds: float
    decode_seconds: float
    record: Any
    features: np.ndarray


def complete(
    programs: Decoder,
    requests: Sequence[Request],
    *,
    target_params: dict,
    drafter_params: Callable[[np.ndarray], Any],
    route: Callable[[Array, int], np.ndarray],
    batch: int,
    budget: int,
    vocab_size: int,
    smallest: int = BUCKETS[0],
    decode_params: dict | None = None,
) -> Timed:
    """Decodes one batch from ids in host memory to ids in host memory.

    Args:
        requests: at most `batch` of one prompt bucket.
        drafter_params: the routes `[B]` -> parameters of the drafter (merged for one route, with the bank for several).
        route: (features `[B, H]`, rows) -> routes `[B]`, -1 for the base drafter.
        budget: most new tokens that the buffers hold; a request's own budget may be smaller.
        smallest: the smallest prompt bucket; a large one means few programs, where compiling costs more than padding.
        decode_params: the target's parameters for everything behind the prompt, where they are laid out otherwise.
    """
    start = time.perf_counter()
    prompt = as_prompt(requests, batch, smallest)
    sampling = as_sampling(requests, batch, vocab_size)
    slots = slots_of(prompt.tokens.shape[1], budget)
    state, features = programs.prefill(target_params, prompt.tokens, prompt.length, slots)
    features = np.asarray(features)
    routed = time.perf_counter()
    routes = route(features, len(requests))
    chosen = time.perf_counter()
    prompt = prompt._replace(route=np.asarray(routes, np.int32))
    params = SpecParams(target_params if decode_params is None else decode_params, drafter_params(routes))
    out = programs.decode(params, prompt, state, sampling, slots)
    tokens, length, stopped, counts, record = jax.device_get(out)
    end = time.perf_counter()
    rows = [
        Completion(
            tokens[i, len(r.ids) : length[i]].tolist(),
            "stop" if stopped[i] else "length",
            Counts(*(leaf[i] for leaf in counts)),
        )
        for i, r in enumerate(requests)
    ]
    return Timed(rows, np.asarray(routes), routed - start, chosen - routed, end - chosen, record, features)


@jax.jit
def _keys(seeds: Array, numbers: Array) -> Array:
    return jax.vmap(row_key)(seeds, numbers)
