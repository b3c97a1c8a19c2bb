"""What rounds and steps take on this device: several ways, timed in turn."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from jaxspec import metrics
from jaxspec.engine import FOREVER, Engine, Method, Seconds
from jaxspec.requests import Completion, Request

Way = TypeVar("Way", bound=Hashable)

FEWER, MORE = 1, 3  # the two chains of a slope, in parts


def timed(
    ways: Mapping[Way, tuple[Engine, Method]], requests: Sequence[Request], passes: int
) -> dict[Way, dict[str, float]]:
    """Tokens per second, milliseconds a round, draft accuracy and mean acceptance length of every way.

    Passes over the requests take turns, so that what slows the machine slows all ways; of each the fastest counts.
    """
    seconds: dict[Way, list[Seconds]] = {way: [] for way in ways}
    done: dict[Way, list[Completion]] = {}
    with tqdm(total=(passes + 1) * len(ways), desc="calibrate", unit="pass") as bar:
        for number in range(passes + 1):  # the first pass compiles and does not count
            for way, (engine, method) in ways.items():
                done[way] = engine.complete(requests, method)
                if number:
                    seconds[way].append(engine.seconds)
                bar.update()
    return {way: _row(done[way], seconds[way], engine.slots) for way, (engine, _) in ways.items()}


class Paced(NamedTuple):
    """What a step of a chain takes, in seconds.

    seconds: by the medians of the runs; fastest: by the fastest runs, for what the device can do and for shared machines;
    steps: of the shorter of the two chains that say so.
    """

    seconds: float
    fastest: float
    steps: int


def paced(
    chains: Mapping[Way, Callable[[int], object]],
    *,
    seconds: float,
    passes: int,
    most: Mapping[Way, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Way, Paced]:
    """Seconds of a step of every chain, by slope: what begins and ends a call is in no step.

    Args:
        chains: each runs so many steps and returns when they are done.
        seconds: what the shorter chain should take, where `most` lets it.
        most: steps of a chain's longest run, where it has a limit.
        clock: seconds; that of the host.
    """

    def spent(chain: Callable[[int], object], steps: int) -> float:
        start = clock()
        chain(steps)
        return clock() - start

    def fitting(way: Way) -> int:
        chains[way](FEWER)  # compiles
        steps, limit = FEWER, max(FEWER, (most or {}).get(way, FOREVER) // MORE)
        while (taken := spent(chains[way], steps)) < seconds / 4 and steps < limit:
            steps = min(4 * steps, limit)
        return min(limit, max(FEWER, round(steps * seconds / taken)))

    steps = {way: fitting(way) for way in tqdm(chains, desc="compile", unit="program", leave=False)}
    times: dict[Way, dict[int, list[float]]] = {
        way: {part * n: [] for part in (FEWER, MORE)} for way, n in steps.items()
    }
    for _ in tqdm(range(passes), desc="measure", unit="pass", leave=False):
        for way, own in times.items():
            for number, taken in own.items():
                taken.append(spent(chains[way], number))
    return {way: Paced(slope(own), slope(own, of=min), steps[way]) for way, own in times.items()}


def slope(seconds: Mapping[int, Sequence[float]], of: Callable[[Sequence[float]], float] = statistics.median) -> float:
    """Seconds a step: what a longer run takes over a shorter one, by their medians, to each step that it is longer."""
    (few, short), (many, long) = sorted(seconds.items())
    return (of(long) - of(short)) / (many - few)


def _row(done: Sequence[Completion], seconds: Sequence[Seconds], slots: int) -> dict[str, float]:
    counts = [completion.counts for completion in done]
    figures = metrics.measures(metrics.total(counts))
    keep = {name: figures[name] for name in ("draft_accuracy", "mean_acceptance_length")}
    rounds = sum(own.num_drafts for own in counts) / slots
    decode, whole = min(own.decode for own in seconds), min(map(sum, seconds))
    return {"tokens_per_second": figures["tokens"] / whole, "round_milliseconds": 1e3 * decode / rounds, **keep}
