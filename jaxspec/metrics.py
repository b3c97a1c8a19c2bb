"""Counts of drafted and accepted tokens, and the measures made of them.

Draft accuracy is accepted over drafted tokens where places past the row's end are not counted (TaskSpec's measure): not in
its last block, and not in a block before it that reached over the end. The draft acceptance rate counts every block
whole, as vLLM does.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.types import SpecInfo


class Counts(NamedTuple):
    """Per row, over all its rounds; every field has rows first.

    num_drafts: `[B]` rounds, that is target calls after prefill.
    num_draft_tokens, num_accepted_tokens: `[B]` every block whole.
    num_emitted: `[B]` tokens out.
    drafted_by_position, accepted_by_position: `[B, N]` by place in the block.
    recent_start, recent_drafted: `[B, N]` the last N blocks, for `up_to_the_end` to subtract what reached over it.
    """

    num_drafts: Array
    num_draft_tokens: Array
    num_accepted_tokens: Array
    num_emitted: Array
    drafted_by_position: Array
    accepted_by_position: Array
    recent_start: Array
    recent_drafted: Array


def no_counts(batch: int, num_nodes: int) -> Counts:
    """Zeros to fold into."""
    row, place = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, num_nodes), jnp.int32)
    return Counts(row, row, row, row, place, place, place, place)


def count(counts: Counts, info: SpecInfo) -> Counts:
    """Adds one round."""
    place = jnp.arange(counts.drafted_by_position.shape[1])
    emitted = info.verdict.num_emitted
    before = lambda number: (place < number[:, None]).astype(jnp.int32)
    newest = lambda kept, value: jnp.where((emitted > 0)[:, None], jnp.append(kept[:, 1:], value[:, None], 1), kept)
    return Counts(
        counts.num_drafts + (emitted > 0),
        counts.num_draft_tokens + info.num_drafted,
        counts.num_accepted_tokens + info.num_accepted,
        counts.num_emitted + emitted,
        counts.drafted_by_position + before(info.num_drafted),
        counts.accepted_by_position + before(info.verdict.num_accepted),
        newest(counts.recent_start, info.start),
        newest(counts.recent_drafted, info.num_drafted),
    )


def up_to_the_end(counts: Counts, length: Array) -> Counts:
    """Takes back drafted places past each row's final `length [B]`; rows' lengths are known only when they are done."""
    place = jnp.arange(counts.drafted_by_position.shape[1])
    reached = (counts.recent_start[..., None] + place >= length[:, None, None]) & (
        place < counts.recent_drafted[..., None]
    )
    return counts._replace(drafted_by_position=counts.drafted_by_position - reached.sum(1))


def total(counts: Iterable[Counts]) -> Counts:
    """Sums rows of several host-side counts into one row-less count."""
    return jax.tree.map(lambda *leaves: np.sum([leaf for leaf in leaves], axis=0), *counts)


def measures(counts: Counts) -> dict:
    """The figures of one row-less count; None where nothing was drafted or decoded."""
    ratio = lambda a, b: float(a) / float(b) if b else None
    drafted, accepted = np.asarray(counts.drafted_by_position), np.asarray(counts.accepted_by_position)
    return {
        "tokens": int(counts.num_emitted),
        "draft_accuracy": ratio(accepted.sum(), drafted.sum()),
        "draft_acceptance_rate": ratio(counts.num_accepted_tokens, counts.num_draft_tokens),
        "mean_acceptance_length": ratio(counts.num_emitted, counts.num_drafts),
        "acceptance_by_position": [ratio(a, counts.num_drafts) for a in accepted] if drafted.sum() else None,
    }
