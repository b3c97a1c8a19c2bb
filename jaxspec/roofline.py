"""The least that a program must move and compute, and the time that a device needs for it: the floor.

Counted is what no implementation can leave out, and what batching shares only once: a call reads every kernel, bias and scale
once, of the embedding the rows looked up, or all of it where it is also the head; of the cache the columns that hold tokens,
not the slots allocated; it writes its window's columns, and the float32 logits that it is asked for. Everything else
(activations, scores of attention, sampling) may stay on the chip and counts nothing; adapters count as bytes alone. Each
call of a drafter counts anew, so that one whose weights stay in a cache on the chip may beat its floor. A multiplication
and its addition are two operations.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.adapters import Bank, Stacked, Whole
from jaxspec.transformer import LMConfig, abstract

Interval = tuple[float, float]


class Work(NamedTuple):
    """What must be done: bytes `read` and `written`, and `operations` of products and attention."""

    read: int = 0
    written: int = 0
    operations: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def together(works: Iterable[Work]) -> Work:
    """One after another."""
    return Work(*(sum(column) for column in zip(*works, strict=True)))


def window(
    config: LMConfig, dtype: Any, *, rows: int, width: int, cached: int, scored: int | None = None, adapters: int = 0
) -> Work:
    """A call that reads `width` tokens of each of `rows` rows behind `cached` ones.

    Args:
        scored: columns of which the logits are asked, all unless it says otherwise; 0 reads a prompt.
        adapters: bytes of the rows' own, see `updates`.
    """
    scored = width if scored is None else scored
    itemsize, tokens = jnp.dtype(dtype).itemsize, rows * width
    column = 2 * config.num_kv_heads * config.head_dim * itemsize
    seen = [min(cached, (config.window(layer) or cached + 1) - 1) for layer in range(config.num_layers)]
    head = config.vocab_size * config.width
    return Work(
        read=weight_bytes(config, dtype, looked_up=tokens, head=scored > 0) + adapters + rows * column * sum(seen),
        written=rows * (width * column * config.num_layers + scored * config.vocab_size * 4),
        operations=2 * (tokens * _kernels(config) + rows * (scored * head + _attended(config, cached, width))),
    )


def weight_bytes(config: LMConfig, dtype: Any, *, looked_up: int, head: bool) -> int:
    """Bytes of the weights that a call reads which looks up so many tokens, with or without logits."""
    params = abstract(config, dtype)
    table = params.pop("embed")["embedding"]
    own_head = params.pop("head", None)
    itemsize, rows = jnp.dtype(dtype).itemsize, min(looked_up, config.vocab_size)
    read_rows = config.vocab_size if config.tied and head else rows
    return _bytes(params) + read_rows * table.shape[1] * itemsize + (_bytes(own_head) if head else 0)


def drafting(config: LMConfig, dtype: Any, *, rows: int, number: int, cached: int, adapters: int = 0) -> Work:
    """`number` tokens drafted one after another, as `drafters.lm.chain` does: a window of two, then windows of one."""
    known = {"rows": rows, "scored": 1, "adapters": adapters}
    opening = window(config, dtype, width=2, cached=max(cached - 2, 0), **known)
    return together([opening, *(window(config, dtype, width=1, cached=cached + i, **known) for i in range(number - 1))])


def updates(config: LMConfig, dtype: Any, bank: Bank | Stacked | None, routes: int) -> int:
    """Bytes that so many routes add to a call: their adapters; of merged or whole weights, all but the first's."""
    if bank is None:
        return 0
    if isinstance(bank, Stacked):
        return (routes - 1) * _kernels(config) * jnp.dtype(dtype).itemsize
    number = len(jax.tree.leaves(bank)[0])
    if isinstance(bank, Whole):
        return (routes - 1) * _bytes(bank) // number
    return routes * _bytes(bank) // number


def floor(work: Work, bandwidth: float, peak: float | None = None) -> float:
    """Seconds that the work takes at best.

    Args:
        bandwidth: bytes per second.
        peak: operations per second; None leaves them out.
    """
    return max(work.bytes / bandwidth, work.operations / peak if peak else 0.0)


def busy(lines: Iterable[Sequence[Interval]]) -> float:
    """Time in which at least one of the lines has an interval."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(interval for line in lines for interval in line):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def leaves(line: Sequence[Interval]) -> list[Interval]:
    """Those intervals of a line that hold no other: what ran, without the loops and calls around it."""
    ordered = sorted(line, key=lambda interval: (interval[0], -interval[1]))
    holds = lambda outer, inner: inner[0] < outer[1] and inner[1] <= outer[1]
    return [own for i, own in enumerate(ordered) if i + 1 == len(ordered) or not holds(own, ordered[i + 1])]


def _attended(config: LMConfig, cached: int, width: int) -> int:
    """Multiplications of one row's attention: scores and weighted sums of the keys that each column sees."""
    keys = (
        min(cached + column + 1, config.window(layer) or cached + width)
        for layer in range(config.num_layers)
        for column in range(width)
    )
    return 2 * config.num_heads * config.head_dim * sum(keys)


def _kernels(config: LMConfig) -> int:
    """Numbers in the layers' kernels."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)["layers"]) if leaf.ndim == 2)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
