"""What rounds take on this device: several ways of drafting, timed in turn on the same requests."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

from jaxspec import metrics
from jaxspec.engine import Engine, Method, Seconds
from jaxspec.requests import Completion, Request

Way = TypeVar("Way", bound=Hashable)


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


def _row(done: Sequence[Completion], seconds: Sequence[Seconds], slots: int) -> dict[str, float]:
    counts = [completion.counts for completion in done]
    figures = metrics.measures(metrics.total(counts))
    keep = {name: figures[name] for name in ("draft_accuracy", "mean_acceptance_length")}
    rounds = sum(own.num_drafts for own in counts) / slots
    decode, whole = min(own.decode for own in seconds), min(map(sum, seconds))
    return {"tokens_per_second": figures["tokens"] / whole, "round_milliseconds": 1e3 * decode / rounds, **keep}
