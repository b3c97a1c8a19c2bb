"""The plots of one benchmark: bars, acceptance by position, the router's choices, clusters, curves of training."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from decode import comparison, scaling
from decode.comparison import Compared
from decode.drawing import COLOURS, EDGE, INK, MARKERS, MUTED, STYLE, Bench, cell, legend, png, short
from jaxspec.store.curves import FIELDS, HELD

Plots = dict[str, bytes | None]

COMPARED = "pools_compared"
OUTSIDE: dict[str, Any] = {"linestyle": "--", "marker": "o", **EDGE, "markersize": 3}
# Field -> (heading, decimals). None keeps six digits: one differing text in ten thousand must not round to none.
MEASURES = {
    "draft_accuracy": ("Draft accuracy", 3),
    "speedup_vs_autoregressive": ("Speedup against autoregressive", 2),
    "speedup_vs_base": ("Speedup against base", 2),
    "draft_acceptance_rate": ("Draft acceptance rate, all K of the last block counted", 3),
    "mean_acceptance_length": ("Mean acceptance length, tokens per target call", 2),
    "equal_to_autoregressive": ("Equal to autoregressive decoding of the same width", None),
    "equal_to_fastest_autoregressive": ("Equal to autoregressive decoding of the fastest width", None),
    "prompts": ("Prompts", 0),
    "tokens": ("Tokens", 0),
    "seconds": ("Seconds", 2),
    "prefill_seconds": ("Seconds of prefill", 2),
    "decode_seconds": ("Seconds of decoding", 2),
}


def draw(bench: Bench, compared: Sequence[Compared] = (), scaled: Mapping[str, Bench] = MappingProxyType({})) -> Plots:
    """Every plot by name, as the bytes of a PNG; None where the bench has nothing to draw."""
    router = bench.get("router") or {}
    with matplotlib.style.context(["default", STYLE]):
        figures = {
            "draft_accuracy": _bars(bench, ["draft_accuracy"]),
            "speedup": _bars(bench, ["speedup_vs_autoregressive", "speedup_vs_base"]),
            "acceptance_by_position": _positions(bench),
            "router_confusion": _confusion(router.get("confusion")),
            "clusters": _clusters(bench.get("clusters")),
            "training": _training(bench.get("curves")),
        }
        if len(compared) > 1:
            figures[COMPARED] = comparison.draw(compared)
        if "throughput" in scaled:
            figures["throughput"] = scaling.draw_throughput(scaled["throughput"])
        if "growth" in scaled:
            figures["growth"] = scaling.draw_growth(scaled["growth"])
        return {name: figure and png(figure) for name, figure in figures.items()}


def groups_of(bench: Bench) -> list[tuple[str, Bench]]:
    """What a table's row and a plot's group stand for: the tasks in their order, then their mean."""
    mean = bench.get("mean")
    return [*(bench.get("tasks") or {}).items(), *([("mean", mean)] if mean else [])]


def methods_of(bench: Bench, field: str | None = None) -> list[str]:
    """The methods with a number for `field` in any group, in the order of `COLOURS`, unknown ones last."""
    rows = [row for _, row in groups_of(bench)]
    seen = dict.fromkeys(m for row in rows for m in row if field is None or cell(row, m, field) is not None)
    order = list(COLOURS)
    return sorted(seen, key=lambda method: order.index(method) if method in order else len(order))


def _colours(bench: Bench) -> dict[str, str]:
    spare = itertools.cycle(MUTED)
    return {method: COLOURS.get(method) or next(spare) for method in methods_of(bench)}


def _bars(bench: Bench, fields: list[str]) -> Figure | None:
    fields = [field for field in fields if methods_of(bench, field)]
    if not fields:
        return None
    groups = [name for name, _ in groups_of(bench)]
    methods = list(dict.fromkeys(m for field in fields for m in methods_of(bench, field)))
    width = min(18.0, max(7.0, 1.5 + 1.15 * len(groups)))
    figure = Figure(figsize=(width, 1.2 + 3.0 * len(fields)), layout="constrained")
    axes = figure.subplots(len(fields), squeeze=False, sharex=True)[:, 0]
    for axis, field in zip(axes, fields, strict=True):
        _grouped_bars(axis, bench, methods, field)
        axis.set(ylabel=MEASURES[field][0], xlim=(-0.6, len(groups) - 0.4))
        _name_columns(axis, groups)
    legend(figure, axes[0].containers, methods, loc="outside upper center")
    return figure


def _grouped_bars(axis: Axes, bench: Bench, methods: list[str], field: str) -> None:
    rows, width = [row for _, row in groups_of(bench)], 0.84 / len(methods)
    colours = [_colours(bench)[method] for method in methods]
    for i, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        left = np.arange(len(rows)) - 0.42 + i * width
        heights = np.array([cell(row, method, field) for row in rows], float)
        again = colour in colours[:i]  # of two methods in one colour the second is hatched
        lines: dict[str, Any] = {"edgecolor": "white", "hatch": "////"} if again else {"edgecolor": INK}
        axis.bar(left, heights, width, align="edge", color=colour, linewidth=0.4, **lines)
    axis.grid(axis="y")
    if field.startswith("speedup"):
        axis.axhline(1.0, color=INK, linewidth=1, linestyle="--")


def _positions(bench: Bench) -> Figure | None:
    field = "acceptance_by_position"
    methods = methods_of(bench, field)
    groups = [(name, row) for name, row in groups_of(bench) if any(cell(row, m, field) for m in methods)]
    if not groups:
        return None
    across, down = min(3, len(groups)), math.ceil(len(groups) / 3)
    figure = Figure(figsize=(max(7.0, 3.6 * across), 1.0 + 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    reached = {method: _reached([cell(row, method, field) or [] for _, row in groups]) for method in methods}
    for panel, (name, row) in zip(panels, groups, strict=False):
        shares = {method: (cell(row, method, field) or [])[: reached[method]] for method in methods}
        _curves(panel, shares, _colours(bench))
        panel.set_title(short(name), fontsize=10)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    figure.supxlabel("position in the block", fontsize=10)
    figure.supylabel("share accepted", fontsize=10)
    legend(figure, panels[0].lines, methods, loc="outside upper center")
    return figure


def _reached(tasks: list[list[float | None]]) -> int:
    """The last position, from 1, at which anything was accepted on any task: a tree is less deep than it has nodes."""
    return max((at for shares in tasks for at, share in enumerate(shares, 1) if share), default=1)


def _curves(panel: Axes, shares: dict[str, list[float]], colours: dict[str, str]) -> None:
    for method, marker in zip(shares, itertools.cycle(MARKERS), strict=False):
        heights = np.array(shares[method], float)
        panel.plot(np.arange(1, len(heights) + 1), heights, color=colours[method], marker=marker, **EDGE)
    longest = max(map(len, shares.values()))
    panel.set(xlim=(0.7, longest + 0.3), ylim=(-0.03, 1.03))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.grid(axis="y")


def _confusion(confusion: Bench | None) -> Figure | None:
    if not confusion or not np.size(confusion["counts"]):
        return None
    counts = np.array(confusion["counts"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    down, across = counts.shape
    figure = Figure(figsize=(max(5.5, 3.2 + 0.75 * across), max(3.0, 2.0 + 0.5 * down)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        axis.text(j, i, str(counts[i, j]), ha="center", va="center", color="white" if share > 0.5 else "black")
    axis.set(xlabel="drafter chosen", ylabel="task of the prompt")
    _name_columns(axis, confusion["drafters"])
    axis.set_yticks(range(down), [short(name) for name in confusion["tasks"]])
    figure.colorbar(image, label="share of the task's prompts")
    return figure


def _clusters(clusters: Bench | None) -> Figure | None:
    if not clusters or not clusters["points"]:
        return None
    points, names = np.array(clusters["points"], float), clusters["names"]
    panels = {"cluster found": ([names[i] for i in clusters["cluster"]], names)}
    if any(clusters.get("task") or []):
        labels = [task or "no label" for task in clusters["task"]]
        panels["hidden label"] = (labels, sorted(set(labels)))
    figure = Figure(figsize=(max(7.0, 6.2 * len(panels)), 6.4), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.set(title=title, xticks=[], yticks=[])
        _scatter(axis, points, *panels[title])
    return figure


def _training(curves: Bench | None) -> Figure | None:
    if not curves:
        return None
    figure, colours = Figure(figsize=(9.0, 6.4), layout="constrained"), dict(zip(curves, itertools.cycle(MUTED)))
    panels = figure.subplots(2, 1, sharex=True)
    for panel, field in zip(panels, FIELDS, strict=True):
        for name, own in curves.items():
            _course(panel, own, field, colours[name])
        panel.set(ylabel=field)
        panel.grid(axis="y")
    panels[1].set(xlabel="step")
    key = {name: Line2D([], [], color=colour, linewidth=2) for name, colour in colours.items()}
    if any(HELD in own for own in curves.values()):
        key |= {"trained on": Line2D([], [], color=INK), "held out": Line2D([], [], color=INK, **OUTSIDE)}
    legend(figure, key.values(), list(key), loc="outside upper center")
    return figure


def _course(panel: Axes, own: Bench, field: str, colour: str) -> None:
    """The mean of a course's drafters on the rows that they are trained on, each of several thinly, and the mean held out."""
    heights = np.array(own[field], float)
    panel.plot(own["step"], heights.mean(1), color=colour, linewidth=2)
    if heights.shape[1] > 1:
        panel.plot(own["step"], heights, color=colour, linewidth=0.6, alpha=0.4)
    if HELD in own:
        panel.plot(own[HELD]["step"], np.mean(own[HELD][field], axis=1), color=colour, **OUTSIDE)


def _scatter(axis: Axes, points: np.ndarray, labels: list[str], names: list[str]) -> None:
    for name, colour, marker in zip(names, itertools.cycle(MUTED), itertools.cycle(MARKERS), strict=False):
        chosen = points[np.array(labels) == name]
        axis.scatter(*chosen.T, s=20, color=colour, marker=marker, linewidths=0.3, edgecolors=INK)
    legend(axis, axis.collections, names, loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=9)


def _name_columns(axis: Axes, names: list[str]) -> None:
    labels = [short(name) for name in names]
    axis.set_xticks(range(len(labels)), labels)
    room = axis.get_window_extent().width / len(labels)
    if 8.6 * max(map(len, labels)) > room:  # a letter takes about that many pixels
        for label in axis.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
