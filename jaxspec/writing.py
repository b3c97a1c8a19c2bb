"""Texts that drafters write themselves, and what the target says along them: alignment on the drafter's own policy.

No gradient goes through the writing. Source: DistillSpec, https://arxiv.org/abs/2310.08461.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxspec import verify
from jaxspec.align import top_and_tail
from jaxspec.drafters import silent_drafter
from jaxspec.requests import Request, as_prompt, as_sampling, bucket_of, room_of
from jaxspec.speculate import run, speculator
from jaxspec.store.models import Pair
from jaxspec.store.traces import Texts, Traces
from jaxspec.target import lm_target
from jaxspec.transformer import LMConfig, forward, unembed
from jaxspec.types import ONE_DEVICE, Placement, SpecParams


class Author:
    """Any drafter of one shape answers prompts by itself, autoregressively; one compiled program for all of them.

    Args:
        vocab_size: the target's, where the two are padded differently.
        rows: prompts answered together.
        bucket, most: what the longest prompt fits, and the longest answer, in tokens.
        sampled: whether requests have a temperature; else all are answered greedily.
    """

    def __init__(
        self,
        config: LMConfig,
        *,
        vocab_size: int,
        stop_tokens: Sequence[int],
        rows: int,
        bucket: int,
        most: int,
        sampled: bool,
        dtype=jnp.float32,
        placement: Placement = ONE_DEVICE,
    ):
        self.vocab_size, self.rows, self.bucket, self.sampled = vocab_size, rows, bucket, sampled
        self._place = placement.rows
        model = lm_target(config, dtype, vocab_size)
        rule = verify.rejection if sampled else verify.greedy
        alone = speculator(model, silent_drafter(1), rule, stop_tokens=stop_tokens)
        room = room_of(bucket, most)

        def write(weights, prompt, sampling):
            params = SpecParams(weights, ())
            state, _ = model.init(weights, prompt, room)
            start = alone.init(params, prompt, state, sampling, room)
            end, _ = run(alone.step, lambda stats, info: stats, params, start, ())
            return end.tokens, end.length

        self._write = jax.jit(write)

    def answers(self, weights: dict, requests: Sequence[Request]) -> list[list[int]]:
        """What the drafter of these weights says to each request, its stop token included."""
        out = []
        for at in range(0, len(requests), self.rows):
            group = requests[at : at + self.rows]
            prompt = as_prompt(group, self.rows, self.bucket, [])
            sampling = as_sampling(group, self.rows, self.vocab_size) if self.sampled else None
            tokens, length = jax.device_get(self._write(weights, *self._place((prompt, sampling))))
            out += [tokens[i, len(own.ids) : length[i]].tolist() for i, own in enumerate(group)]
        return out


class Writer:
    """Drafters in training answer a trace's prompts, and the target scores what they say.

    An answer is at most as long as the stored one: it has room wherever that is packed.

    Args:
        temperature: at which the drafters sample; 0 is greedy.
        rows: texts written, and scored, together.
    """

    def __init__(self, pair: Pair, traces: Traces, *, temperature: float, rows: int, placement: Placement = ONE_DEVICE):
        lengths = np.array(list(map(len, traces.tokens))) - traces.prompt_length
        bucket, self._most = bucket_of(int(traces.prompt_length.max())), int(lengths.max())
        self._traces, self._temperature, self._rows = traces, temperature, rows
        self._width, self._place, self._target = bucket + self._most, placement.rows, pair.target.params
        self._author = Author(
            pair.draft.config,
            vocab_size=pair.vocab_size,
            stop_tokens=pair.stop_tokens,
            rows=rows,
            bucket=bucket,
            most=self._most,
            sampled=temperature > 0,
            dtype=jax.tree.leaves(pair.draft.params)[0].dtype,
            placement=placement,
        )
        kept = {"room": self._most, "top": traces.top_ids.shape[-1]}
        self._score = jax.jit(partial(score, pair.target.config, **kept))

    def texts(self, weights: dict, examples: Sequence[int], seed: int) -> Texts:
        """The texts of one drafter to these examples' prompts, in their order; the same seed draws the same texts."""
        requests = [self._request(i, seed) for i in examples]
        outputs = self._author.answers(weights, requests)
        tokens = [np.array([*own.ids, *output], np.int32) for own, output in zip(requests, outputs, strict=True)]
        lengths = np.array([len(own.ids) for own in requests], np.int32)
        scored = [self._scored(tokens[at:][: self._rows], lengths[at:][: self._rows]) for at in self._groups(tokens)]
        return Texts(tokens, lengths, *(np.concatenate(column) for column in zip(*scored, strict=True)))

    def _request(self, i: int, seed: int) -> Request:
        own, length = self._traces.tokens[i].tolist(), self._traces.prompt_length[i]
        settings = {"number": int(i), "seed": seed, "temperature": self._temperature}
        return Request(ids=tuple(own[:length]), max_new_tokens=len(own) - int(length), **settings)

    def _groups(self, tokens: list) -> range:
        return range(0, len(tokens), self._rows)

    def _scored(self, tokens: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
        whole = np.zeros((self._rows, self._width), np.int32)
        for row, own in zip(whole, tokens, strict=False):
            row[: len(own)] = own
        padded = np.pad(lengths, (0, self._rows - len(lengths)), constant_values=1)
        out = jax.device_get(self._score(self._target, *self._place((whole, padded))))
        return [column[: len(tokens)] for column in out]


def score(config: LMConfig, params: dict, tokens: Array, prompt_length: Array, *, room: int, top: int):
    """What is kept of the target's distributions along texts `[B, T]`, see `top_and_tail`: leaves `[B, room, ...]`."""
    hidden = answering(forward(config, params, tokens), prompt_length, room)
    return top_and_tail(unembed(config, params, hidden), top)


def answering(hidden: Array, prompt_length: Array, room: int) -> Array:
    """The states that predict an answer, `room` of them from the prompt's last token on: `[B, T, H]` -> `[B, room, H]`."""
    at = jnp.minimum(prompt_length[:, None] - 1 + jnp.arange(room), hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[..., None], axis=1)
