"""Teacher forcing: what a drafter says along a text that the target has emitted already, and the rounds that follow from it.

Under greedy decoding a drafter sees nothing but the target's own tokens, so one pass over a finished text tells each round
that any draft length would have had there, exactly; the target does not run.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec.align import Batch
from jaxspec.packing import as_batch, pack, places
from jaxspec.requests import MAX_DRAFT, bucket_of
from jaxspec.store.models import Pair
from jaxspec.store.recalibration import Sample
from jaxspec.store.traces import Texts, Traces
from jaxspec.transformer import LMConfig, forward, unembed
from jaxspec.types import Draft, Drafter

ROWS = 8  # packed rows in a pass


class Rounds(NamedTuple):
    """How many rounds a text takes, and up to its end the tokens drafted and accepted in them."""

    rounds: int
    drafted: int
    accepted: int


def log_q(
    config: LMConfig, weights: dict, adapter, tokens: Array, segments: Array, at: Array, vocab_size: int
) -> Array:
    """A drafter's log-probabilities at places `at [R, M]` of packed rows `[R, T]`: `[R, M, V]`."""
    hidden = forward(config, weights, tokens, segments=segments, adapter=adapter)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return jax.nn.log_softmax(unembed(config, weights, hidden, vocab_size), axis=-1)


def greedy(config: LMConfig, weights: dict, tokens: Array, segments: Array, at: Array, vocab_size: int) -> Array:
    """A drafter's best tokens at those places: `[R, M]`."""
    return jnp.argmax(log_q(config, weights, None, tokens, segments, at, vocab_size), axis=-1)


def agreements(
    best: Callable[..., Array], traces: Traces | Texts, examples: Sequence[int], row_tokens: int
) -> list[np.ndarray]:
    """For each example its output places `[O]` at which a drafter's best token is the target's.

    Args:
        best: (tokens, segments, at) -> the drafter's best tokens; compiled once, for packed rows of `row_tokens`.
    """
    found: dict[int, np.ndarray] = {}
    for group, batch in packed(traces, examples, row_tokens):
        said = best(batch.tokens, batch.segments, batch.at)
        found |= apart(group, batch, said == batch.top_ids[..., 0])
    return [found[i] for i in examples]


def packed(traces: Traces | Texts, examples: Sequence[int], row_tokens: int) -> Iterator[tuple[list[list[int]], Batch]]:
    """The examples in batches of ROWS packed rows, and which are in each row."""
    if not examples:
        return
    rows = pack([len(own) for own in traces.tokens], examples, row_tokens)
    room = places(traces, rows, row_tokens)
    for start in range(0, len(rows), ROWS):
        group = rows[start : start + ROWS]
        yield group, as_batch(traces, [*group, *[[]] * (ROWS - len(group))], row_tokens, room)


def apart(group: Sequence[Sequence[int]], batch: Batch, values: Array) -> dict[int, np.ndarray]:
    """What packed values `[R, M, ...]` say of each example's output places: `[O, ...]`."""
    found, values = {}, jax.device_get(values)
    for r, row in enumerate(group):
        owner = batch.segments[r, batch.at[r]]
        for segment, i in enumerate(row):
            found[i] = values[r, batch.mask[r] & (owner == segment)]
    return found


def proposing(
    drafter: Drafter, traces: Traces | Texts, examples: Sequence[int]
) -> tuple[Callable[[Array, Array], tuple[Draft, Array]], int, int]:
    """How a drafter without weights goes on at every output place of a text, with the text's width S and O for all of them.

    It is (text `[S]`, its prompt's length) -> drafts of O rows, and the places `[O, N]` that they speak of.
    """
    slots = bucket_of(max(map(len, traces.tokens)) + drafter.num_nodes)
    room = max((len(traces.tokens[i]) - int(traces.prompt_length[i]) for i in examples), default=0)

    def propose(text: Array, begin: Array) -> tuple[Draft, Array]:
        length = begin + jnp.arange(room)
        draft, _ = drafter.propose((), (), jnp.broadcast_to(text, (room, slots)), length, None, None)
        return draft, length[:, None] + jnp.arange(drafter.num_nodes)

    return propose, slots, room


def lookups(drafter: Drafter, traces: Traces | Texts, examples: Sequence[int]) -> list[np.ndarray]:
    """For each example, at each output place `[O]`, how many tokens a drafter without weights would have had accepted there."""
    propose, slots, _ = proposing(drafter, traces, examples)

    @jax.jit
    def right(tokens: Array, best: Array, begin: Array) -> Array:
        draft, place = propose(tokens, begin)
        said = best[jnp.minimum(place, slots - 1)]
        counts = jnp.arange(drafter.num_nodes) < draft.num_drafted[:, None]
        return jnp.cumprod(counts & (draft.tokens == said), axis=1).sum(1)

    found = []
    for i in examples:
        text, begin = traces.tokens[i], int(traces.prompt_length[i])
        left = np.arange(len(text) - begin, 0, -1)  # what lies behind the text is no token
        best = np.concatenate(
            [text[:begin], traces.top_ids[i][: len(left), 0]]
        )  # the target's own, whatever the log says
        row = lambda ids: np.pad(ids, (0, slots - len(ids)))
        run = np.asarray(right(row(text), row(best), begin))
        found.append(np.minimum(run[: len(left)], left))
    return found


def agreeing(agrees: np.ndarray) -> np.ndarray:
    """How many places from each on agree in a row: `[O]` of booleans -> `[O]`."""
    run = np.zeros(len(agrees) + 1, np.int64)
    for place in reversed(range(len(agrees))):
        run[place] = run[place + 1] + 1 if agrees[place] else 0
    return run[:-1]


def chain(run: np.ndarray, num_speculative_tokens: int) -> Rounds:
    """Greedy rounds of one text, of whose places `run [O]` says how many drafted tokens would be accepted from there on.

    Every round, the first of them after the prompt, drafts so many tokens and emits those accepted and one more.
    """
    end = len(run)
    at, rounds, drafted, accepted = 0, 0, 0, 0
    while at < end:
        kept = min(int(run[at]), num_speculative_tokens)
        rounds, accepted = rounds + 1, accepted + kept
        drafted += min(num_speculative_tokens, end - at)
        at += kept + 1
    return Rounds(rounds, drafted, accepted)


def acceptance_length(texts: Sequence[np.ndarray], num_speculative_tokens: int) -> float:
    """Tokens a round over all texts; 1 where there is no text."""
    rounds = sum(chain(run, num_speculative_tokens).rounds for run in texts)
    return sum(map(len, texts)) / rounds if rounds else 1.0


class Judge:
    """What drafters of one shape would have had accepted on the calibrate split.

    Args:
        texts: how many of each task count.
    """

    def __init__(self, pair: Pair, sample: Sample, texts: int):
        self.texts, self.examples = sample.texts, sample.of_each(texts)
        self._pair, self._best = pair, _best_of(pair)
        self._row_tokens = bucket_of(max(map(len, sample.texts.tokens)))

    def of(self, pair: Pair) -> "Judge":
        """A judge by the same texts of drafters of another shape."""
        if pair.draft.config == self._pair.draft.config:
            return self
        other = copy.copy(self)
        other._pair, other._best = pair, _best_of(pair)
        return other

    def lengths(self, weights: dict) -> list[list[float] | None]:
        """Tokens a round by task and number of drafted tokens from 0 on; None for a task without texts."""
        best = partial(self._best, weights)
        found = [agreements(best, self.texts, rows, self._row_tokens) for rows in self.examples]
        return [_by_length([agreeing(agrees) for agrees in texts]) for texts in found]

    def looked_up(self, drafter: Drafter) -> list[list[float] | None]:
        """The same of a drafter without weights that drafts MAX_DRAFT tokens, and fewer alike."""
        return [_by_length(lookups(drafter, self.texts, rows)) for rows in self.examples]


@lru_cache(maxsize=8)
def _best_of(pair: Pair) -> Callable[..., Array]:
    return jax.jit(partial(greedy, pair.draft.config, vocab_size=pair.vocab_size))


def _by_length(texts: Sequence[np.ndarray]) -> list[float] | None:
    return [acceptance_length(texts, k) for k in range(MAX_DRAFT + 1)] if texts else None
