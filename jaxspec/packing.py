"""Sequences of many lengths in rows of one length: several in a row, told apart by segment."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxspec.align import Batch
from jaxspec.store.traces import Texts, Traces


def pack(lengths: Sequence[int], order: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit: examples in `order` into rows of at most `row_tokens`; longer ones have a row of their own, cut."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        need = min(lengths[i], row_tokens)
        at = next((r for r in range(max(0, len(rows) - 16), len(rows)) if room[r] >= need), None)
        if at is None:
            rows.append([])
            room.append(row_tokens)
            at = len(rows) - 1
        rows[at].append(i)
        room[at] -= need
    return rows


def packed_rows(
    lengths: Sequence[int], examples: np.ndarray, number: int, row_tokens: int, seed: int
) -> list[list[int]]:
    """At least `number` rows over `examples`, epoch after epoch, each in an order of its own drawn from the seed."""
    rows: list[list[int]] = []
    epoch = 0
    while len(rows) < number:
        order = np.random.default_rng((seed, epoch)).permutation(examples)
        rows += pack(lengths, order.tolist(), row_tokens)
        epoch += 1
    return rows[:number]


def places(traces: Traces | Texts, rows: Sequence[Sequence[int]], row_tokens: int) -> int:
    """The most predicting places in any row, rounded up to a multiple of 16: the M of `Batch`."""
    most = max(sum(len(_cut(traces, i, row_tokens)[1]) for i in row) for row in rows)
    return -(-most // 16) * 16


def as_batch(traces: Traces | Texts, rows: Sequence[Sequence[int]], row_tokens: int, room: int) -> Batch:
    """Host arrays of packed rows; `room` is M."""
    number, k = len(rows), traces.top_ids.shape[-1]
    zeros: Callable[..., Any] = lambda *shape, dtype=np.int32: np.zeros((number, *shape), dtype)
    batch = Batch(
        tokens=zeros(row_tokens),
        segments=zeros(row_tokens) - 1,
        at=zeros(room),
        mask=zeros(room, dtype=bool),
        emitted=zeros(room),
        top_ids=zeros(room, k),
        log_p=zeros(room, k + 1, dtype=np.float32),
    )
    for r, row in enumerate(rows):
        _fill(batch, r, traces, row, row_tokens)
    return batch


def _fill(batch: Batch, r: int, traces: Traces | Texts, row: Sequence[int], row_tokens: int) -> None:
    start = place = 0
    room = batch.at.shape[1]
    for segment, i in enumerate(row):
        tokens, outputs, dropped = _cut(traces, i, row_tokens)
        end = start + len(tokens)
        batch.tokens[r, start:end], batch.segments[r, start:end] = tokens, segment
        outputs = outputs[: room - place]
        upto = place + len(outputs)
        at = outputs + traces.prompt_length[i] - 1 - dropped
        batch.at[r, place:upto], batch.mask[r, place:upto] = start + at, True
        batch.emitted[r, place:upto] = tokens[at + 1]
        batch.top_ids[r, place:upto] = traces.top_ids[i, outputs]
        batch.log_p[r, place:upto, :-1] = traces.top_log_p[i, outputs]
        batch.log_p[r, place:upto, -1] = traces.tail_log_p[i, outputs]
        start, place = end, upto


def _cut(traces: Traces | Texts, i: int, row_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """An example's last `row_tokens` tokens, which output places they hold, and how many tokens were dropped."""
    tokens = traces.tokens[i]
    dropped = max(0, len(tokens) - row_tokens)
    outputs = np.arange(len(tokens) - traces.prompt_length[i])
    return tokens[dropped:], outputs[outputs + traces.prompt_length[i] - 1 >= dropped], dropped
