"""What happened in each round, and the counts and measures made of it.

Draft accuracy is accepted over drafted tokens where places past the row's end are not counted (TaskSpec's measure): not in
its last block, and not in a block before it that reached over the end. The draft acceptance rate counts every block
whole, as vLLM does. Of a token tree, which has several tokens for a place and at most one of them accepted, both count
the places, so that they say how far down the levels drafts were right; what it costs are nodes and calls, and the mean
acceptance length compares it with chains. The end is known only when the row is done, so the device keeps the rounds and
the host counts.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.types import SpecInfo


class History(NamedTuple):
    """Rounds of each row.

    rounds: `[B]` how many; blocks: `[B, L, 3]` where each began, how many places it drafted for, and how many tokens the rule
        accepted.
    """

    rounds: Array
    blocks: Array


class Counts(NamedTuple):
    """What one row's rounds come to, or many rows'.

    num_drafts: rounds, that is target calls after prefill.
    num_draft_tokens, num_accepted_tokens: every block whole.
    num_emitted: tokens out.
    drafted_by_position, accepted_by_position: `[N]` by place in the block, up to the row's end.
    num_verified_nodes: drafted nodes that the target scored, those among them that a row's limit left out.
    num_drafter_calls: times that the drafter's weights were read, one after another.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_emitted: int
    drafted_by_position: np.ndarray
    accepted_by_position: np.ndarray
    num_verified_nodes: int
    num_drafter_calls: int


def no_history(rows: int, rounds: int) -> History:
    """Nothing yet, with space for so many rounds."""
    return History(jnp.zeros(rows, jnp.int32), jnp.zeros((rows, rounds, 3), jnp.int32))


def remember(history: History, info: SpecInfo) -> History:
    """Adds one round of the rows that emitted something."""
    block = jnp.stack([info.start, info.num_drafted, info.num_accepted], axis=1)
    alive = info.verdict.num_emitted > 0
    at = jnp.where(alive, history.rounds, history.blocks.shape[1])  # past the end: dropped
    row = jnp.arange(len(block))
    return History(history.rounds + alive, history.blocks.at[row, at].set(block, mode="drop"))


def counts(
    rounds: int, blocks: np.ndarray, begin: int, end: int, num_places: int, *, num_nodes: int, num_calls: int
) -> Counts:
    """Counts of one row whose output takes the places from `begin` to `end`; on the host.

    Args:
        blocks: `[L, 3]` the row's history, of which `rounds` are real; rounds at or past `end` do not count.
        num_places: N of what is counted by position; num_nodes, num_calls: of each round.
    """
    start, drafted, accepted = blocks[:rounds][blocks[:rounds, 0] < end].T
    place = np.arange(num_places)
    reached = start[:, None] + place < end
    of = lambda number: ((place < number[:, None]) & reached).sum(0)
    whole = len(start), drafted.sum(), accepted.sum(), end - begin
    return Counts(*whole, of(drafted), of(accepted), len(start) * num_nodes, len(start) * num_calls)


def total(rows: Iterable[Counts]) -> Counts:
    """Sums the counts of several rows."""
    return jax.tree.map(lambda *leaves: np.sum([leaf for leaf in leaves], axis=0), *rows)


def measures(counts: Counts) -> dict:
    """The figures of summed counts; None where nothing was drafted or decoded."""
    ratio = lambda a, b: float(a) / float(b) if b else None
    drafted, accepted = np.asarray(counts.drafted_by_position), np.asarray(counts.accepted_by_position)
    return {
        "tokens": int(counts.num_emitted),
        "draft_accuracy": ratio(accepted.sum(), drafted.sum()),
        "draft_acceptance_rate": ratio(counts.num_accepted_tokens, counts.num_draft_tokens),
        "mean_acceptance_length": ratio(counts.num_emitted, counts.num_drafts),
        "acceptance_by_position": [ratio(a, counts.num_drafts) for a in accepted] if drafted.sum() else None,
        "nodes_a_round": ratio(counts.num_verified_nodes, counts.num_drafts),
        "drafter_calls_a_round": ratio(counts.num_drafter_calls, counts.num_drafts),
    }
