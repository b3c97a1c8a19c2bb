"""What p/q rejection is expected to accept along texts, at a temperature: `forced` for drafts that are sampled.

A token drafted from q is kept with probability sum(min(p, q)), Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, and
the first n of a round with the product of n such sums. That is exact for the first. Those behind it are looked at after the
text's own tokens, whatever would have been kept there, which is an approximation, as is a text that was not sampled at that
temperature. The target reads the texts once to say what p is: a trace keeps its largest probabilities, which do not tell
those of another temperature.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec import forced
from jaxspec.align import total_variation
from jaxspec.requests import MAX_DRAFT
from jaxspec.sampling import log_probs
from jaxspec.store.models import Pair
from jaxspec.store.recalibration import Sample
from jaxspec.transformer import LMConfig, forward, unembed
from jaxspec.types import Drafter, Sampling


class Judge(forced.Judge):
    """What drafters of one shape are expected to have accepted on the calibrate split, sampled at a temperature above 0."""

    def __init__(self, pair: Pair, sample: Sample, texts: int, temperature: float):
        super().__init__(pair, sample, texts)
        target, self._temperature = pair.target, jnp.full(1, temperature)
        read = jax.jit(partial(hidden, target.config))
        packed = lambda rows: forced.packed(self.texts, rows, self._row_tokens)
        of = lambda batch: read(target.params, batch.tokens, batch.segments, batch.at)
        self._read = [[(group, batch, of(batch)) for group, batch in packed(rows)] for rows in self.examples]

    def lengths(self, weights: dict) -> list[list[float] | None]:
        """Tokens a round by task and number of drafted tokens from 0 on; None for a task without texts."""
        overlap = partial(_overlap_of(self._pair), self._pair.target.params, weights, self._temperature)
        found = [[(group, batch, overlap(batch, seen)) for group, batch, seen in own] for own in self._read]
        return [
            self._by_length([in_chains(along(own)) for own in texts]) for texts in map(_apart, self.examples, found)
        ]

    def looked_up(self, drafter: Drafter, params: Any = ()) -> list[list[float] | None]:
        """The same of a drafter without weights that drafts MAX_DRAFT nodes, of which fewer are the first ones."""
        texts, every = self.texts, [i for rows in self.examples for i in rows]
        propose, slots, room = forced.proposing(drafter, texts, every)
        target = self._pair.target

        @jax.jit
        def kept(weights: dict, params: Any, seen: Array, text: Array, begin: Array, end: Array) -> Array:
            draft, place = propose(params, text, begin)
            log_p = _log_p(target.config, weights, seen, self._pair.vocab_size, self._temperature)
            p = jnp.exp(log_p)[jnp.minimum(place - begin, room - 1), draft.tokens]
            return forced.reached(draft, jnp.where(place < end, p, 0.0))

        def of(i: int, seen: np.ndarray) -> np.ndarray:
            text, begin, whole = texts.tokens[i], int(texts.prompt_length[i]), ((0, room - len(seen)), (0, 0))
            row = np.pad(text, (0, slots - len(text)))
            own = kept(target.params, params, np.pad(seen, whole), row, begin, len(text))
            return np.asarray(own)[: len(seen)]

        seen = map(_apart, self.examples, self._read)
        return [
            self._by_length([of(i, own) for i, own in zip(rows, each, strict=True)])
            for rows, each in zip(self.examples, seen, strict=True)
        ]

    @staticmethod
    def _by_length(texts: Sequence[np.ndarray]) -> list[float] | None:
        """Tokens a round over all texts, of which each is told as `rounds` wants it."""
        return (sum(map(len, texts)) / np.sum([rounds(own) for own in texts], axis=0)).tolist() if texts else None


def overlap(log_p: Array, log_q: Array) -> Array:
    """Probability that a token drafted from q is kept: `[..., V]`, `[..., V]` -> `[...]`."""
    return 1.0 - total_variation(log_q, log_p)


def along(overlaps: np.ndarray) -> np.ndarray:
    """`[O]` by place -> `[O, MAX_DRAFT]`: what tokens drafted from each place on are kept with; 0 behind the end."""
    ahead = np.arange(len(overlaps))[:, None] + np.arange(MAX_DRAFT)
    return np.pad(overlaps, (0, MAX_DRAFT))[ahead]


def in_chains(kept: np.ndarray) -> np.ndarray:
    """`[O, K]` probability that each token of a chain is kept if those before it are -> `[O, K + 1, K + 1]`, for `rounds`."""
    end, most = kept.shape
    reach = np.concatenate([np.ones((end, 1)), np.cumprod(kept, axis=1)], axis=1)
    return np.tril(np.broadcast_to(reach[:, None], (end, most + 1, most + 1)))


def rounds(reach: np.ndarray) -> np.ndarray:
    """Expected rounds of one text by the number of nodes drafted, `[N + 1]`; where all is certain those of `forced.chain`.

    Args:
        reach: `[O, N + 1, N + 1]` how far a round that begins at each place goes, see `forced.reached`.
    """
    end, most = len(reach), reach.shape[-1] - 1
    accepted = reach - np.pad(reach[..., 1:], ((0, 0), (0, 0), (0, 1)))
    begun = np.zeros((end + most + 1, most + 1))  # probability that a round begins there, by number drafted
    begun[0] = 1.0
    for place in range(end):
        begun[place + 1 : place + most + 2] += begun[place] * accepted[place].T
    return begun[:end].sum(0)


def hidden(config: LMConfig, params: dict, tokens: Array, segments: Array, at: Array) -> Array:
    """Hidden states at places `at [R, M]` of packed rows `[R, T]`: `[R, M, H]`."""
    return jnp.take_along_axis(forward(config, params, tokens, segments=segments), at[..., None], axis=1)


@lru_cache(maxsize=8)
def _overlap_of(pair: Pair) -> Callable[..., Array]:
    """(target's params, drafter's, temperature, batch, the target's hidden states there) -> overlaps `[R, M]`; row by row."""
    target, draft = pair.target.config, pair.draft.config

    @jax.jit
    def of(params: dict, weights: dict, temperature: Array, batch, seen: Array) -> Array:
        own = hidden(draft, weights, batch.tokens, batch.segments, batch.at)
        p = lambda row: _log_p(target, params, row, pair.vocab_size, temperature)
        q = lambda row: _log_p(draft, weights, row, pair.vocab_size, temperature)
        return jax.lax.map(lambda rows: overlap(p(rows[0]), q(rows[1])), (seen, own))

    return of


def _log_p(config: LMConfig, params: dict, seen: Array, vocab_size: int, temperature: Array) -> Array:
    """What is sampled from after hidden states `[M, H]`: `[M, V]`."""
    return log_probs(unembed(config, params, seen, vocab_size)[None], Sampling(temperature))[0]


def _apart(examples: Sequence[int], values: Sequence[tuple]) -> list[np.ndarray]:
    """Packed values of every example, in their order."""
    found = {i: own for group, batch, value in values for i, own in forced.apart(group, batch, value).items()}
    return [found[i] for i in examples]
