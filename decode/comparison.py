"""Pools side by side, of several benches or rivals in one: what a larger drafter, more tasks or longer training bring."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from decode.drawing import COLOURS, EDGE, INK, MARKERS, Bench, cell, legend

METHODS = ("base", "mixed", "routed", "chosen")
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
BESIDE = 9  # points between methods of one place
LARGE: dict[str, Any] = EDGE | {"markersize": 10}
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
    figure = Figure(figsize=(9.5, 1.2 + 3.0 * len(MEASURES)), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(AXES), sharex="col", sharey="row", squeeze=False)
    for row, (measure, heading) in zip(panels, MEASURES.items(), strict=True):
        row[0].set_ylabel(heading)
        for panel, (x, (_, scale)) in zip(row, AXES.items(), strict=True):
            _points(figure, panel, compared, measure, x, scale)
    for panel, (x, (label, scale)) in zip(panels[-1], AXES.items(), strict=True):
        panel.set_xlabel(label)
        _ticks(panel, sorted({one.settings[x] * scale for one in compared if one.settings[x] is not None}))
    lines = {method: line for method, line in zip(METHODS, panels[0, 0].lines, strict=False)}
    measured = [method for method in METHODS if any(method in one.figures for one in compared)]
    legend(figure, [lines[method] for method in measured], measured, loc="outside upper center")
    return figure


def _ticks(panel: Axes, there: list[float]) -> None:
    """The pools' own values, where they are few and lie apart."""
    apart = all(right - left > 0.12 * (there[-1] - there[0]) for left, right in itertools.pairwise(there))
    if 0 < len(there) <= 6 and apart:
        panel.set_xticks(there, [f"{value:.3g}" for value in there])
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6))


def _points(figure: Figure, panel: Axes, compared: Sequence[Compared], measure: str, x: str, scale: float) -> None:
    """A point a pool and method with the pool's number in it; methods stand side by side where their pool has its place."""
    for beside, (method, marker) in enumerate(zip(METHODS, MARKERS, strict=False)):
        value = lambda one, method=method: one.figures.get(method, {}).get(measure)
        at = [i for i, one in enumerate(compared) if one.settings[x] is not None and value(one) is not None]
        across, up = [compared[i].settings[x] * scale for i in at], [value(compared[i]) for i in at]
        aside = BESIDE * (beside - (len(METHODS) - 1) / 2)
        (points,) = panel.plot(across, up, linestyle="none", marker=marker, color=COLOURS[method], **LARGE)
        # Moved afterwards, so that the panel's limits are those of the data.
        points.set_transform(offset_copy(panel.transData, figure, aside, units="points"))
        for i, place in zip(at, zip(across, up, strict=True), strict=True):
            where: dict[str, Any] = {
                "xytext": (aside, 0),
                "textcoords": "offset points",
                "ha": "center",
                "va": "center_baseline",
            }
            panel.annotate(str(i + 1), place, **where, fontsize=7, color=_readable(COLOURS[method]))
    panel.margins(0.12)
    panel.grid(axis="y")
    if measure.startswith("speedup"):
        panel.axhline(1.0, color=INK, linewidth=1, linestyle="--")


def _readable(colour: str) -> str:
    """The colour of letters on that one."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
