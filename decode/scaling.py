"""Throughput by the number of slots, and what decoding costs along each axis of growth: what a report shows of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from decode.drawing import COLOURS, EDGE, INK, MARKERS, MUTED, Bench, legend, short
from jaxspec.config import UserError

KNEE = 0.9  # share of a method's most tokens per second, at which it has all but stopped growing
BEST = "routed, best K"
TITLES = {
    "context": "tokens cached in every row",
    "tasks": "tasks in the bank",
    "drafted": "tokens drafted an iteration",
    "vocabulary": "rows of the vocabulary",
    "prefill": "tokens of the prompt",
}
MEASURED, FLOOR, FIRST = "measured", "floor", "to the first token"
LINES = {MEASURED: COLOURS["routed"], FLOOR: COLOURS["autoregressive"], FIRST: COLOURS["base"]}
WHEN = {"cold": COLOURS["base"], "cached": COLOURS["routed"]}


def check_throughput(path: Path, own: Bench) -> None:
    """Raises UserError for what `decode.throughput` did not write."""
    rows = own.get("rows") if isinstance(own, dict) else None
    if not (isinstance(rows, list) and rows and all(_is_row(row) for row in rows)):
        raise UserError(f"--throughput {path} has no rows by slots; give the file of decode.throughput's --json")


def check_growth(path: Path, own: Bench) -> None:
    """Raises UserError for what `decode.growth` did not write."""
    axes = own.get("axes") if isinstance(own, dict) else None
    complete = isinstance(axes, dict) and all(isinstance(axis, dict) and axis.get("rows") for axis in axes.values())
    if not (axes and complete and isinstance(own.get("settings"), dict)):
        raise UserError(f"--growth {path} has no axes of growth; give the file of decode.growth's --output")


def knee(slots: Sequence[int], rates: Sequence[float]) -> int:
    """The fewest slots with at least KNEE of the most tokens per second."""
    return min(own for own, rate in zip(slots, rates, strict=True) if rate >= KNEE * max(rates))


def by_method(own: Bench) -> dict[str, list[float]]:
    """Tokens per second of each method in every number of slots; the fastest draft length where several were measured."""
    rows = own["rows"]
    methods = [
        name for name, figures in rows[0].items() if isinstance(figures, dict) and "tokens_per_second" in figures
    ]
    rates = {name: [row[name]["tokens_per_second"] for row in rows] for name in methods}
    best = [max(row["by_length"].values()) for row in rows if row.get("by_length")]
    return rates | ({BEST: best} if len(best) == len(rows) else {})


def draw_throughput(own: Bench) -> Figure:
    """Tokens per second against slots, each method's knee ringed, the best draft length written beside its point."""
    slots, rates = [row["slots"] for row in own["rows"]], by_method(own)
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axis, spare = figure.subplots(), iter(MUTED)
    for (name, heights), marker in zip(rates.items(), MARKERS, strict=False):
        colour = COLOURS.get(name) or next(spare)
        axis.plot(slots, heights, color=colour, marker=marker, **EDGE)
        at = knee(slots, heights)
        axis.plot([at], [heights[slots.index(at)]], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
    for row, height in zip(own["rows"], rates.get(BEST, []), strict=False):
        axis.annotate(f"K = {row['best']}", (row["slots"], height), (0, 8), textcoords="offset points", ha="center")
    _doubling(axis, slots)
    axis.set(xlabel="slots", ylabel="tokens per second", ylim=(0, 1.12 * max(map(max, rates.values()))))
    axis.grid(axis="y")
    legend(figure, axis.lines[::2], list(rates), loc="outside upper center")
    return figure


def throughput_table(own: Bench) -> tuple[list[str], list[list[Any]]]:
    """Heading and rows: tokens per second by slots, the best draft length, and the knees."""
    slots, rates = [row["slots"] for row in own["rows"]], by_method(own)
    rows = [[str(at), *(rate[i] for rate in rates.values())] for i, at in enumerate(slots)]
    head = ["slots", *rates]
    if BEST in rates:
        rows, head = [[*cells, row["best"]] for cells, row in zip(rows, own["rows"], strict=True)], [*head, "best K"]
    knees = ["knee, slots", *(knee(slots, rate) for rate in rates.values())]
    return head, [*rows, [*knees, *([None] if BEST in rates else [])]]


def draw_growth(own: Bench) -> Figure:
    """A panel an axis, what was measured beside its floor, and one of seconds of compiling."""
    axes = own["axes"]
    names = [*(name for name in TITLES if name in axes), *(["compile"] if "compile" in axes else [])]
    across, down = min(3, len(names)), math.ceil(len(names) / 3)
    figure = Figure(figsize=(max(7.0, 4.4 * across), 0.8 + 3.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        _compiling(panel, axes[name]["rows"]) if name == "compile" else _line(panel, name, axes[name]["rows"])
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    drawn = {line.get_label(): line for panel in panels for line in panel.lines}
    if drawn:
        legend(figure, drawn.values(), [str(name) for name in drawn], loc="outside upper center")
    return figure


def growth_tables(own: Bench) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Heading and rows of every axis, by what its table is called."""
    tables = {}
    for name, title in TITLES.items():
        if name in own["axes"]:
            rows = own["axes"][name]["rows"]
            head = [title, "floor, ms", "measured, ms", "measured / floor", *(_READ if name == "prefill" else ())]
            tables[f"Growth: {name}"] = head, [_cells(row, name == "prefill") for row in rows]
    if "compile" in own["axes"]:
        rows = [[row["program"], row["cold"], row["cached"]] for row in own["axes"]["compile"]["rows"]]
        tables["Seconds of compiling"] = ["program", "cold", "cached"], rows
    return tables


_READ = ("tokens per second", "model FLOP utilisation", "first token, ms")


def _cells(row: Bench, read: bool) -> list[Any]:
    own = [f"{row['value']:,}", 1e3 * row["floor"], 1e3 * row["seconds"], row["seconds"] / row["floor"]]
    first = row.get("first_token")
    return [*own, row["tokens_per_second"], row["flop_utilisation"], first and 1e3 * first["seconds"]] if read else own


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and "slots" in row and isinstance(row.get("autoregressive"), dict)


def _line(panel: Axes, name: str, rows: list[Bench]) -> None:
    values = [row["value"] for row in rows]
    heights = {MEASURED: [row["seconds"] for row in rows], FLOOR: [row["floor"] for row in rows]}
    if all(row.get("first_token") for row in rows):
        heights[FIRST] = [row["first_token"]["seconds"] for row in rows]
    for (label, own), marker in zip(heights.items(), MARKERS, strict=False):
        style = "--" if label == FLOOR else "-"
        panel.plot(values, [1e3 * y for y in own], style, label=label, color=LINES[label], marker=marker, **EDGE)
    panel.set(xlabel=TITLES[name], ylabel="milliseconds", ylim=(0, None))
    panel.grid(axis="y")
    if name == "drafted":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    else:
        _doubling(panel, values)


def _compiling(panel: Axes, rows: list[Bench]) -> None:
    for i, (when, colour) in enumerate(WHEN.items()):
        places = [at + 0.4 * i for at in range(len(rows))]
        panel.barh(places, [row[when] or 0.0 for row in rows], 0.4, color=colour, edgecolor=INK, label=when)
    panel.set_yticks([at + 0.2 for at in range(len(rows))], [short(row["program"]) for row in rows])
    panel.invert_yaxis()
    panel.set(xlabel="seconds of compiling")
    panel.legend(fontsize=8)


def _doubling(axis: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis that names some of the values, few enough that their names do not touch."""
    axis.set_xscale("log", base=2)
    shown = list(values)[:: -(-len(values) // 5)]
    axis.set_xticks(
        shown, [f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value) for value in shown]
    )
    axis.xaxis.set_minor_locator(NullLocator())
