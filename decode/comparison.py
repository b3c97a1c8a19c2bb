"""Pools side by side, of several benches or rivals in one: what a larger drafter, more tasks or longer training bring."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from decode.drawing import COLOURS, EDGE, INK, MARKERS, Bench, cell, legend

METHODS = ("base", "mixed", "routed")
MEASURES = {
    "tokens_per_second": "Tokens per second",
    "speedup_vs_autoregressive": "Speedup against autoregressive",
    "draft_accuracy": "Draft accuracy",
}
SETTINGS = {
    "drafter_parameters": "drafter's parameters",
    "num_tasks": "tasks",
    "target": "target",
    "steps": "steps",
    "trunk": "trunk",
    "num_speculative_tokens": "K",
    "device": "device",
    "dtype": "dtype",
    "batch": "batch",
    "temperature": "temperature",
    "commit": "commit",
}
AXES = {"drafter_parameters": ("drafter's parameters, millions", 1e-6), "num_tasks": ("number of tasks", 1)}


class Compared(NamedTuple):
    """A pool in the comparison.

    settings: a value or None for each of `SETTINGS`; figures: of each method measured, a value or None for each of `MEASURES`.
    """

    name: str
    settings: dict[str, Any]
    figures: dict[str, dict[str, float | None]]


def pools(benches: dict[str, Bench]) -> list[Compared]:
    """Each bench's own pool and then its rivals, by the benches' names; the figures are those of the mean over tasks."""
    return [one for name, bench in benches.items() for one in _of_bench(name, bench)]


def _of_bench(name: str, bench: Bench) -> list[Compared]:
    own = _compared(name, bench, bench, {method: method for method in METHODS})
    rivals = [
        _compared(f"{name}: {rival}", bench, bench | said, {m: f"{rival}/{m}" for m in METHODS} | {"routed": rival})
        for rival, said in (bench.get("rivals") or {}).items()
    ]
    return [own, *rivals]


def _compared(name: str, bench: Bench, said: Bench, rows: dict[str, str]) -> Compared:
    """A pool of which the bench says these things, its methods in these rows."""
    known = said | (said.get("training") or {})
    mean = bench.get("mean") or {}
    figures = {method: _figures(mean, row) for method, row in rows.items() if mean.get(row)}
    return Compared(name, {field: known.get(field) for field in SETTINGS}, figures)


def _figures(mean: Bench, row: str) -> dict[str, float | None]:
    tokens, seconds = cell(mean, row, "tokens"), cell(mean, row, "seconds")
    own = {field: cell(mean, row, field) for field in MEASURES}
    return own | {"tokens_per_second": tokens / seconds if tokens and seconds else None}


def table(compared: Sequence[Compared]) -> tuple[list[str], list[list[Any]]]:
    """Heading and rows: the pools by number and name, their settings and their figures."""
    columns = [(method, field) for field in MEASURES for method in METHODS]
    head = ["pool", *SETTINGS.values(), *(f"{method}: {MEASURES[field].lower()}" for method, field in columns)]
    figures = lambda one: [one.figures.get(method, {}).get(field) for method, field in columns]
    return head, [[f"{at}: {one.name}", *one.settings.values(), *figures(one)] for at, one in enumerate(compared, 1)]


def draw(compared: Sequence[Compared]) -> Figure | None:
    """Every measure against the drafter's size and the number of tasks; a pool is a number, None where none can be placed."""
    if not any(one.settings[x] is not None and one.figures for one in compared for x in AXES):
        return None
    figure = Figure(figsize=(9.5, 1.2 + 2.6 * len(MEASURES)), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(AXES), sharex="col", sharey="row", squeeze=False)
    for row, (measure, heading) in zip(panels, MEASURES.items(), strict=True):
        row[0].set_ylabel(heading)
        for panel, (x, (_, scale)) in zip(row, AXES.items(), strict=True):
            _points(panel, compared, measure, x, scale)
    for panel, (x, (label, _)) in zip(panels[-1], AXES.items(), strict=True):
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=x == "num_tasks"))
    legend(figure, panels[0, 0].lines[: len(METHODS)], list(METHODS), loc="outside upper center")
    return figure


def _points(panel: Axes, compared: Sequence[Compared], measure: str, x: str, scale: float) -> None:
    for method, marker in zip(METHODS, MARKERS, strict=False):
        value = lambda one, method=method: one.figures.get(method, {}).get(measure)
        at = [i for i, one in enumerate(compared) if one.settings[x] is not None and value(one) is not None]
        across, up = [compared[i].settings[x] * scale for i in at], [value(compared[i]) for i in at]
        panel.plot(across, up, linestyle="none", marker=marker, color=COLOURS[method], **EDGE)
        for i, place in zip(at, zip(across, up, strict=True), strict=True):
            panel.annotate(str(i + 1), place, (5, 0), textcoords="offset points", fontsize=8, color=INK, va="center")
    panel.margins(0.12)
    panel.grid(axis="y")
    if measure.startswith("speedup"):
        panel.axhline(1.0, color=INK, linewidth=1, linestyle="--")
