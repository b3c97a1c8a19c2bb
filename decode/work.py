"""The work of a bench: methods decode batches in turns, compiled and warmed up beforehand."""

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from decode.figures import Ask, Pass, Result
from decode.methods import Chosen
from decode.settings import Bench
from jaxspec.engine import Method, Seconds
from jaxspec.requests import Completion, Request, bucket_of
from jaxspec.router import TRUNK


class Decoder(Protocol):
    """What takes part in a bench: an `Engine`, or other software behind its face."""

    lengths: list[int]
    seconds: Seconds

    def complete(self, requests: Sequence[Request], method: Method) -> list[Completion]:
        """Completions in the order of the requests; `seconds` tells what they took."""
        ...


class Work(NamedTuple):
    """The batches to decode, and the ways of choosing drafters for them."""

    config: Bench
    asks: Sequence[Ask]
    batches: Sequence[tuple[str, list[int]]]
    methods: dict[str, Chosen]

    @property
    def sample(self) -> list[list[int]]:
        """Rows of a few batches, on which settings are tried."""
        return [rows for _, rows in self.batches[:: max(1, len(self.batches) // 3)]][:3]

    def decode(self, engine: Decoder, name: str, rows: list[int], **changes) -> Result:
        """One batch by one method."""
        method, routes, _ = self.methods[name]
        of = lambda i: {} if routes is None else {"route": int(routes[i])}
        requests = [dataclasses.replace(self.asks[i].request, **(of(i) | changes)) for i in rows]
        return Result(rows, engine.complete(requests, method), engine.seconds)

    def warm_up(self, engines: Mapping[str, Decoder]) -> None:
        """Compiles every (program, bucket) and fills the caches of merged weights."""
        seen = set()
        for _, rows in tqdm(self.batches, desc="warm-up", leave=False):
            for i, name in itertools.product(rows, self.methods):
                bucket = bucket_of(len(self.asks[i].request.ids), self.config.smallest_bucket)
                kind, method = (name, bucket), self.methods[name].method
                families = {method.family(route): {"route": route} for route in self.methods[name].reach} or {0: {}}
                for own, k in itertools.product(families.values(), engines[name].lengths) if kind not in seen else ():
                    self.decode(engines[name], name, [i], max_new_tokens=2, num_speculative_tokens=k, **own)
                seen.add(kind)
        for chosen in self.methods.values() if self.config.batch == 1 else ():
            for route in chosen.reach:
                chosen.method.drafter_params(np.array([route]))

    def passes(self, engines: Mapping[str, Decoder]) -> list[Pass]:
        """All methods on all batches, so many times; methods take turns on each batch."""
        done: list[Pass] = []
        with tqdm(total=self.config.passes * len(self.batches) * len(engines), desc="bench", unit="batch") as bar:
            for number in range(self.config.passes):
                results: dict[str, list[Result]] = defaultdict(list)
                for at, (_, rows) in enumerate(self.batches):
                    names = list(self.methods)
                    turn = (number + at) % len(names)
                    for name in names[turn:] + names[:turn]:
                        results[name].append(self.decode(engines[name], name, rows))
                        bar.update()
                done.append(results)
        return done

    def parity(self, engines: Mapping[str, Decoder]) -> dict[str, dict[int, list[int]]]:
        """Each method's program with nothing drafted: autoregressive decoding, bit for bit comparable."""
        slots = self.config.batch
        same: dict[tuple, dict[int, list[int]]] = {}
        outputs: dict[str, dict[int, list[int]]] = {}
        for name, chosen in tqdm(self.methods.items(), desc="parity", leave=False):
            kind = (id(engines[name]), jax.tree.structure(chosen.method.drafter_params(np.full(slots, TRUNK))))
            if kind not in same:
                same[kind] = self.texts(engines[name], name)
            outputs[name] = same[kind]
        return outputs

    def texts(self, engine: Decoder, name: str = "autoregressive") -> dict[int, list[int]]:
        """Every prompt's tokens through an engine's program with nothing drafted."""
        done = [(rows, self.decode(engine, name, rows, draft_limit=0).completions) for _, rows in self.batches]
        return {i: own.ids for rows, completions in done for i, own in zip(rows, completions, strict=True)}


def quickest(seconds: Mapping[int, Callable[[], float]]) -> int:
    """The number that takes the least, by the median of three tries in turn after one that does not count."""
    tries = [{number: once() for number, once in seconds.items()} for _ in range(4)][1:]
    return min(seconds, key=lambda number: statistics.median(own[number] for own in tries))
