"""The figures of a bench: from completions and seconds of every pass to a row a task and method."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from decode.differences import first_difference
from jaxspec import metrics, pooled
from jaxspec.engine import Seconds
from jaxspec.requests import Completion, Request
from jaxspec.router import TRUNK
from jaxspec.store.families import drafter_name, spoken
from jaxspec.store.names import POINTS
from jaxspec.store.pool import Pool
from jaxspec.store.prompts import Line
from jaxspec.store.stages import read_arrays


class Ask(NamedTuple):
    """A prompt of the bench: its line, request, task and the cluster that knowing its label gives, -1 for none."""

    line: Line
    request: Request
    task: str
    cluster: int


class Result(NamedTuple):
    """One method on one batch: completions and seconds of one pass."""

    rows: list[int]
    completions: list[Completion]
    seconds: Seconds


Pass = dict[str, list[Result]]
Texts = dict[int, list[int]]


def figures(
    pool: Pool, asks: Sequence[Ask], passes: Sequence[Pass], parity: dict[str, Texts], narrow: Texts | None
) -> dict:
    """`tasks` and `mean` of the bench's JSON, and where texts part.

    Args:
        passes: each pass's results by method, autoregressive among them.
        parity: tokens of autoregressive decoding through each method's own program; empty when sampling.
        narrow: the same through a program one token wide; None where that is the one that was timed.
    """
    rows_of, names = _rows_of(asks), list(passes[0])
    by_row = {name: [_by_row(results[name]) for results in passes] for name in names}
    tasks = {task: {name: _row(name, rows, by_row, parity) for name in names} for task, rows in rows_of.items()}
    mean = {name: _mean([tasks[task][name] for task in tasks]) for name in names}
    timed = {i: own.completion.ids for i, own in by_row["autoregressive"][-1].items()}
    wide = parity.get(next((name for name in parity if name != "autoregressive"), "autoregressive"), {})
    return {
        "tasks": tasks,
        "mean": mean,
        "first_differences": first_differences(pool, asks, timed, wide),
        "first_differences_one_wide": first_differences(pool, asks, timed if narrow is None else narrow, wide),
    }


def _rows_of(asks: Sequence[Ask]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for i, ask in enumerate(asks):
        rows[ask.task].append(i)
    return rows


class RowTime(NamedTuple):
    """A prompt's completion and its share of its batch's seconds."""

    completion: Completion
    prefill: float
    decode: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def _by_row(results: list[Result]) -> dict[int, RowTime]:
    found = {}
    for rows, completions, seconds in results:
        share = 1 / len(rows)
        for i, completion in zip(rows, completions, strict=True):
            found[i] = RowTime(completion, (seconds.prefill + seconds.route) * share, seconds.decode * share)
    return found


def _row(name: str, rows: list[int], by_row: dict, parity: dict) -> dict:
    """One method on one task."""
    last = by_row[name][-1]
    figures = metrics.measures(metrics.total([last[i].completion.counts for i in rows]))
    median = lambda get: statistics.median(sum(get(one[i]) for i in rows) for one in by_row[name])
    equal = lambda ids: float(np.mean([last[i].completion.ids == ids(i) for i in rows]))
    fastest = by_row["autoregressive"][-1]
    return {
        "prompts": len(rows),
        "tokens_per_second": statistics.median(_rate(one, rows) for one in by_row[name]),
        "seconds": median(lambda t: t.seconds),
        "prefill_seconds": median(lambda t: t.prefill),
        "decode_seconds": median(lambda t: t.decode),
        **figures,
        "equal_to_autoregressive": equal(lambda i: parity[name][i]) if parity else None,
        "equal_to_fastest_autoregressive": equal(lambda i: fastest[i].completion.ids) if parity else None,
        "speedup_vs_autoregressive": _speedup(by_row, "autoregressive", name, rows),
        "speedup_vs_base": _speedup(by_row, "base", name, rows),
    }


def speedups(asks: Sequence[Ask], passes: Sequence[Pass], name: str, against: str) -> dict[str, float]:
    """Of one method against another by task: the median over passes of the ratio of tokens a second."""
    own, other = ([_by_row(results[method]) for results in passes] for method in (name, against))
    return {task: _gain(own, other, rows) for task, rows in _rows_of(asks).items()}


def _speedup(by_row: dict, against: str, name: str, rows: list[int]) -> float | None:
    """Median over passes of the ratio of totals over a task's prompts; tokens a second where lengths differ."""
    return _gain(by_row[name], by_row[against], rows) if against in by_row else None


def _gain(own: list, other: list, rows: list[int]) -> float:
    """Of one method's passes against another's."""
    return statistics.median(_rate(a, rows) / _rate(b, rows) for a, b in zip(own, other, strict=True))


def _rate(one: dict[int, RowTime], rows: list[int]) -> float:
    """Tokens per second of one pass."""
    return sum(len(one[i].completion.ids) for i in rows) / sum(one[i].seconds for i in rows)


def _mean(rows: list[dict]) -> dict:
    """Plain mean over tasks of every figure that has a value in all of them."""
    out = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if any(value is None for value in values):
            out[key] = None
        elif isinstance(first, list):
            out[key] = np.mean(values, axis=0).tolist()
        else:
            out[key] = float(np.mean(values))
    return out


def first_differences(pool: Pool, asks: Sequence[Ask], one: Texts, wide: Texts) -> list[dict]:
    """Where one autoregressive program and the one of the methods' width part, with the two logits there."""
    parted = []
    for i in wide:
        found = first_difference(pool, asks[i].request, one[i], wide[i])
        if found is not None:
            parted.append({"id": asks[i].line.id, "task": asks[i].task, **found})
    return parted


def router_figures(pool: Pool, asks: Sequence[Ask], passes: Sequence[Pass], equals: Sequence[str]) -> dict | None:
    """Accuracy, cost and confusion of the router's tasks; None when `routed` was not measured.

    A prompt of whose task the router was not sure enough has none, whoever drafts for it.

    Args:
        equals: the methods that differ from `routed` in nothing but who drafts, itself among them.
    """
    if "routed" not in passes[0]:
        return None
    route = np.full(len(asks), TRUNK)
    for result in passes[0]["routed"]:
        sure = lambda completion: completion.confidence >= pool.facts["fallback_below"]
        route[result.rows] = [own.task if sure(own) else TRUNK for own in result.completions]
    labels = pool.facts["labels"]
    known = [i for i, ask in enumerate(asks) if ask.task in labels or "cluster" in ask.line.settings]
    right = [_right(pool, asks[i], route[i]) for i in known]
    agree = [route[i] == asks[i].line.settings["cluster"] for i in known if "cluster" in asks[i].line.settings]
    timed = [(result.seconds, len(result.rows)) for results in passes for result in results["routed"]]
    milliseconds = [1e3 * seconds.route / prompts for seconds, prompts in timed]
    shares = [seconds.route / (seconds.prefill + seconds.route) for seconds, _ in timed]
    tasks = sorted({ask.task for ask in asks})
    counts = [
        [sum(ask.task == task and int(route[i]) == t for i, ask in enumerate(asks)) for t in _columns(pool)]
        for task in tasks
    ]
    return {
        "accuracy": float(np.mean(right)) if right else None,
        "agreement_with_partition": float(np.mean(agree)) if agree else None,
        "milliseconds": statistics.median(milliseconds),
        "share_of_time_to_first_token": statistics.median(shares),
        "fallback_rate": float(np.mean(route == TRUNK)),
        "regret": _regret(asks, passes, ["oracle"]) if "oracle" in passes[0] else None,
        "regret_to_best": _regret(asks, passes, equals) if len(equals) > 1 else None,
        "confusion": {"tasks": tasks, "drafters": [*_names(pool), pool.names[-1]], "counts": counts},
    }


def _regret(asks: Sequence[Ask], passes: Sequence[Pass], against: Sequence[str]) -> float:
    """Share of the tokens per second of each task's fastest method `against` that `routed` lacks, the mean over tasks.

    The oracle knows the task, not which drafter is best for it: it takes whom calibration lets serve the task, and where
    that is not the best `routed` may regret less than nothing. Hindsight knows: the fastest of several timings, noise
    included, is a bound from above, and not below zero where `routed` is one of them.
    """
    by_row = {name: [_by_row(results[name]) for results in passes] for name in {"routed", *against}}
    of = lambda name, rows: _gain(by_row["routed"], by_row[name], rows)
    shares = [min(of(name, rows) for name in against) for rows in _rows_of(asks).values()]
    return 1 - float(np.mean(shares))


def choices(pool: Pool, asks: Sequence[Ask], passes: Sequence[Pass]) -> dict[str, dict[str, int]] | None:
    """How many prompts of each task `chosen` gave to which drafter and draft length; None when it was not measured."""
    if "chosen" not in passes[0]:
        return None
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in passes[0]["chosen"]:
        for i, own in zip(result.rows, result.completions, strict=True):
            name = drafter_name(pool.facts, own.route)
            said = f"{name}, {spoken(name, own.num_speculative_tokens)}"
            counts[asks[i].task][said if own.counts.num_draft_tokens else "nothing drafted"] += 1
    return {task: dict(own.most_common()) for task, own in counts.items()}


def rounds_by_drafter(pool: Pool, asks: Sequence[Ask], results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """How many rounds of each task's prompts each drafter drafted, where rows change it as they go."""
    names, rounds = pooled.candidates(pool), defaultdict(Counter)
    for result in results:
        for i, own in zip(result.rows, result.completions, strict=True):
            rounds[asks[i].task] += Counter(dict(zip(names, own.record.rounds.tolist(), strict=True)))
    return {task: {name: count for name, count in own.most_common() if count} for task, own in rounds.items()}


def _right(pool: Pool, ask: Ask, route: int) -> bool:
    """Whether the drafter's cluster has the prompt's label as its majority; without labels, whether it is its cluster."""
    if route == TRUNK:
        return False
    if ask.task in pool.facts["labels"]:
        return pool.facts["labels"][route] == ask.task
    return route == ask.line.settings["cluster"]


def _columns(pool: Pool) -> list[int]:
    return [*range(len(pool.tasks)), TRUNK]


def _names(pool: Pool) -> list[str]:
    labels = pool.facts["labels"]
    return [f"{name} ({label})" if label else name for name, label in zip(pool.tasks, labels, strict=True)]


def cluster_figures(pool: Pool) -> dict:
    """A sample of the log in two dimensions, with its clusters and labels."""
    data = read_arrays(pool.path / POINTS)
    return {
        "points": np.round(data["points"], 4).tolist(),
        "cluster": data["cluster"].tolist(),
        "task": [label or None for label in data["label"].tolist()],
        "names": _names(pool),
    }
