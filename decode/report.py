"""Turns a benchmark into a page that needs nothing else, and the same plots as PNG files beside it.

python -m decode.report --bench bench.json --out report/

More files add a section in which their pools are compared; the rest of the page is about the first. `--throughput` and
`--growth` add what decode.throughput and decode.growth measured.
"""

import base64
import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from decode import comparison, scaling
from decode.comparison import Compared
from decode.drawing import COLOURS, EDGE, INK, MARKERS, MUTED, STYLE, Bench, cell, legend, png, short
from jaxspec.config import UserError, command_line

Plots = dict[str, bytes | None]

DASH = "—"
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
# What a part must hold as lists, if it is there.
NEEDED = {"confusion": ("tasks", "drafters", "counts"), "clusters": ("points", "cluster", "names")}
COMPARED = "pools_compared"
CHECKS = {"throughput": scaling.check_throughput, "growth": scaling.check_growth}
CONDITIONS = {"target": "target ", "device": "", "dtype": "", "batch": "batch ", "num_speculative_tokens": "K = "}
CONDITIONS |= {"temperature": "temperature ", "commit": "commit "}
CURVES = ("step", "loss", "agreement")
SETTINGS = {"pool": "pool ", "autoregressive_width": "autoregressive baseline of width "}
SETTINGS |= {"max_new_tokens": "longest completion in tokens ", "passes": "passes "}
CSS = """
:root { color-scheme: light } body { background: #fff; color: #1b1b1b; max-width: 70rem; margin: 2rem auto;
padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #555; overflow-wrap: anywhere }
div { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600 } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd;
text-align: right } th:first-child { text-align: left } summary { cursor: pointer }
"""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draws a benchmark: report.html with everything inside it, and the plots beside it."""

    bench: tuple[Path, ...]
    """The bench.json that decode.bench wrote; the pools of further ones are compared with its."""
    out: Path
    """Folder for report.html and the plots; made if missing, an older report in it is replaced."""
    throughput: Path | None = None
    """The JSON of decode.throughput: tokens per second by the number of slots."""
    growth: Path | None = None
    """The JSON of decode.growth: cost along each axis beside its floor."""


def run(config: ReportConfig) -> None:
    """Writes the plots, then the page; raises `UserError` for a bench or a folder that will not do."""
    if not config.bench:
        raise UserError("--bench is empty; give at least one file that decode.bench wrote")
    benches = {str(path): load(path) for path in config.bench}
    bench, compared = benches[str(config.bench[0])], comparison.pools(benches)
    scaled = {name: _scaled(name, path) for name in CHECKS if (path := getattr(config, name))}
    plots = draw(bench, compared, scaled)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        for name in (COMPARED, *CHECKS):
            (config.out / f"{name}.png").unlink(missing_ok=True)  # of an older report that had more
        for name, picture in plots.items():
            file = config.out / f"{name}.png"
            file.unlink(missing_ok=True)
            if picture:
                file.write_bytes(picture)
        (config.out / "report.html").write_text(page(bench, plots, compared, scaled), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be written ({error.strerror}); name another folder") from error


def load(path: Path) -> Bench:
    """Reads a bench of schema 1; raises `UserError` for anything else."""
    bench = _read("bench", path)
    schema = bench.get("schema") if isinstance(bench, dict) else None
    if schema != 1:
        raise UserError(f"--bench {path} has schema {schema!r}, only 1 can be read; run decode.bench again")
    _check_parts(path, bench)
    return bench


def _scaled(name: str, path: Path) -> Bench:
    own = _read(name, path)
    CHECKS[name](path, own)
    return own


def _read(name: str, path: Path) -> Any:
    """What `decode.NAME` wrote, from the file that `--NAME` gives."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--{name} {path} cannot be read ({error.strerror}); decode.{name} writes it") from error
    except ValueError as error:
        raise UserError(f"--{name} {path} is not JSON ({error}); give the file that decode.{name} wrote") from error


def _check_parts(path: Path, bench: Bench) -> None:
    """Raises `UserError` where a part that is there lacks a key, or its lists do not belong together."""
    rivals = bench.get("rivals") or {}
    if not (isinstance(rivals, dict) and all(isinstance(said, dict) for said in rivals.values())):
        raise UserError(f"--bench {path}: rivals does not say what each pool is; run decode.bench again")
    for name, keys in NEEDED.items():
        part = bench.get(name) if name == "clusters" else (bench.get("router") or {}).get(name)
        lacking = [key for key in keys if part and not (isinstance(part, dict) and isinstance(part.get(key), list))]
        if lacking:
            raise UserError(f"--bench {path}: {name} has no list {lacking[0]!r}; run decode.bench again")
        if part and not (_is_table(part) if name == "confusion" else _are_points(part)):
            raise UserError(f"--bench {path}: the lists in {name} do not belong together; run decode.bench again")
    for name, own in (bench.get("curves") or {}).items():
        if not isinstance(own, dict) or not _are_curves(own):
            raise UserError(f"--bench {path}: the curves of {name} do not belong together; run decode.bench again")


def _is_table(confusion: Bench) -> bool:
    rows = confusion["counts"]
    across = len(confusion["drafters"])
    return len(rows) in (0, len(confusion["tasks"])) and all(
        isinstance(row, list) and len(row) == across for row in rows
    )


def _are_curves(course: Bench) -> bool:
    columns = [own for key in CURVES if isinstance(own := course.get(key), list)]
    return len(columns) == len(CURVES) and len({len(own) for own in columns}) == 1


def _are_points(clusters: Bench) -> bool:
    number = len(clusters["points"])
    known = range(len(clusters["names"]))
    there = len(clusters["cluster"]) == number and all(own in known for own in clusters["cluster"])
    labels = clusters.get("task") or []
    return there and len(labels) in (0, number) and all(np.shape(point) == (2,) for point in clusters["points"])


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


def page(
    bench: Bench,
    plots: Plots,
    compared: Sequence[Compared] = (),
    scaled: Mapping[str, Bench] = MappingProxyType({}),
) -> str:
    """The report as one HTML document that refers to nothing outside itself."""
    accuracy, over_autoregressive, over_base, *others = (_table(bench, field) for field in MEASURES)
    gain = "Wall clock, prefill and routing included; the dashed line is no gain."
    share = "Share accepted at each position of the block."
    counts = "A row holds a task's prompts: colour is the share sent to each drafter, the number is the count."
    learnt = "Alignment step by step on its training rows: the mean of a course's drafters, and each of several thinly."
    points = "Prompts in two dimensions; a second panel, if any, shows labels that the clustering never saw."
    parts = [
        f"<h1>Speculative decoding report</h1><p>{_facts(bench, CONDITIONS)}<br>{_facts(bench, SETTINGS)}</p>",
        _section(bench, plots, "draft_accuracy", "Draft accuracy", "Accepted over drafted tokens.") + accuracy,
        _section(bench, plots, "speedup", "Speedup", gain) + over_autoregressive + over_base,
        _section(bench, plots, "acceptance_by_position", "Acceptance by position", share),
        _section(bench, plots, "router_confusion", "Router", counts) + _router(bench.get("router")),
        _section(bench, plots, "clusters", "Clusters", points),
        _section(bench, plots, "training", "Training", learnt),
        _pools(plots, compared),
        _throughput(plots, scaled.get("throughput")),
        _growth(plots, scaled.get("growth")),
        f"<h2>Other measures</h2><details><summary>Show the tables</summary>{''.join(others)}</details>",
    ]
    head = f'<meta charset="utf-8"><title>Speculative decoding report</title><style>{CSS}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _bars(bench: Bench, fields: list[str]) -> Figure | None:
    fields = [field for field in fields if _methods(bench, field)]
    if not fields:
        return None
    groups = [name for name, _ in _groups(bench)]
    methods = list(dict.fromkeys(m for field in fields for m in _methods(bench, field)))
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
    rows, width, colours = [row for _, row in _groups(bench)], 0.84 / len(methods), _colours(bench)
    for i, method in enumerate(methods):
        left = np.arange(len(rows)) - 0.42 + i * width
        heights = np.array([cell(row, method, field) for row in rows], float)
        axis.bar(left, heights, width, align="edge", color=colours[method], edgecolor=INK, linewidth=0.4)
    axis.grid(axis="y")
    if field.startswith("speedup"):
        axis.axhline(1.0, color=INK, linewidth=1, linestyle="--")


def _positions(bench: Bench) -> Figure | None:
    field = "acceptance_by_position"
    methods = _methods(bench, field)
    groups = [(name, row) for name, row in _groups(bench) if any(cell(row, m, field) for m in methods)]
    if not groups:
        return None
    across, down = min(3, len(groups)), math.ceil(len(groups) / 3)
    figure = Figure(figsize=(max(7.0, 3.6 * across), 1.0 + 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for panel, (name, row) in zip(panels, groups, strict=False):
        _curves(panel, {method: cell(row, method, field) or [] for method in methods}, _colours(bench))
        panel.set_title(short(name), fontsize=10)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    figure.supxlabel("position in the block", fontsize=10)
    figure.supylabel("share accepted", fontsize=10)
    legend(figure, panels[0].lines, methods, loc="outside upper center")
    return figure


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
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, field in zip(panels, CURVES[1:], strict=True):
        for own, colour in zip(curves.values(), itertools.cycle(MUTED), strict=False):
            heights = np.array(own[field], float)
            panel.plot(own["step"], heights.mean(1), color=colour, linewidth=2)
            if heights.shape[1] > 1:
                panel.plot(own["step"], heights, color=colour, linewidth=0.6, alpha=0.4)
        panel.set(ylabel=field)
        panel.grid(axis="y")
    panels[1].set(xlabel="step")
    legend(
        figure,
        [line for line in panels[0].lines if line.get_linewidth() == 2],
        list(curves),
        loc="outside upper center",
    )
    return figure


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


def _section(bench: Bench, plots: Plots, name: str, title: str, reading: str) -> str:
    return _pictured(_facts(bench, CONDITIONS), plots, name, title, reading)


def _pictured(conditions: str, plots: Plots, name: str, title: str, reading: str) -> str:
    picture = plots[name]
    if not picture:
        return f"<h2>{title}</h2><p>This bench holds nothing to draw in {name}.png, so that plot is left out.</p>"
    image = f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    caption = f"<figcaption>{conditions}</figcaption>"
    return f"<h2>{title}</h2><p>{reading}</p><figure>{caption}{image}</figure>"


def _pools(plots: Plots, compared: Sequence[Compared]) -> str:
    """The section that compares pools, where there are several."""
    if len(compared) < 2:
        return ""
    reading = (
        "Means over tasks; a number is a pool of the table. Tokens per second compare pools that one process has "
        "measured, speedups those of several."
    )
    several = {field: " / ".join({str(one.settings.get(field)): "" for one in compared}) for field in CONDITIONS}
    facts = _facts({field: said for field, said in several.items() if said != "None"}, CONDITIONS)
    head, rows = comparison.table(compared)
    return _pictured(facts, plots, COMPARED, "Pools compared", reading) + _tabled("Pools compared", head, rows)


def _throughput(plots: Plots, own: Bench | None) -> str:
    """The section on the number of slots, of a file that says what it was measured with."""
    if own is None:
        return ""
    reading = (
        "All prompts through an engine of so many slots, prefill and routing included. The ring is a method's knee: the "
        f"fewest slots with at least {scaling.KNEE:.0%} of its most tokens per second; beyond it slots bring little."
    )
    head, rows = scaling.throughput_table(own)
    return _pictured(_facts(own, CONDITIONS), plots, "throughput", "Throughput", reading) + _tabled(
        "Tokens per second by slots", head, rows
    )


def _growth(plots: Plots, own: Bench | None) -> str:
    """The section on growth; each axis was measured on a device of its own."""
    if own is None:
        return ""
    reading = (
        "Of one iteration, and of reading one prompt, with one axis changed at a time; the floor is what must be moved over "
        "the bandwidth that the device showed, or computed over its peak, where that takes longer."
    )
    settings = {name: own["settings"][name] for name in ("slots", "cached", "dtype", "num_speculative_tokens")}
    devices = {axis["device"]: "" for axis in own["axes"].values()}
    facts = html.escape(", ".join([*devices, *(f"{name} {value}" for name, value in settings.items())]))
    tables = [_tabled(name, head, rows) for name, (head, rows) in scaling.growth_tables(own).items()]
    return _pictured(facts, plots, "growth", "Growth", reading) + "".join(tables)


def _tabled(caption: str, head: list[str], rows: list[list[Any]]) -> str:
    return _html_table(caption, head, [[name, *map(_setting, values)] for name, *values in rows])


def _setting(value: Any) -> str:
    """A setting's or figure's text, whose kind the column does not tell."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else _number(value, 3)


def _facts(bench: Bench, labels: dict[str, str]) -> str:
    values = {field: bench.get(field) for field in labels}
    return " · ".join(html.escape(labels[f] + (DASH if v is None else str(v))) for f, v in values.items())


def _table(bench: Bench, field: str) -> str:
    heading, decimals = MEASURES[field]
    methods = _methods(bench)
    groups = [[name, *(_number(cell(row, m, field), decimals) for m in methods)] for name, row in _groups(bench)]
    return _html_table(heading, ["task", *methods], groups)


def _router(router: Bench | None) -> str:
    if not router:
        return ""
    fields = ["accuracy", "milliseconds", "share_of_time_to_first_token", "fallback_rate"]
    fields += [field for field in ("regret", "regret_to_best") if field in router]
    rows = [[field.replace("_", " "), _number(router.get(field), 4)] for field in fields]
    return _html_table("Router", ["measure", "value"], rows)


def _html_table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [[html.escape(cell) for cell in row] for row in rows]
    body = "\n".join(f"<tr><th>{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td></tr>" for row in lines)
    return f"<div><table><caption>{html.escape(caption)}</caption><tr>{titles}</tr>\n{body}</table></div>"


def _number(value: float | None, decimals: int | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if decimals is None else f"{value:.{decimals}f}"


def _groups(bench: Bench) -> list[tuple[str, Bench]]:
    """What a table's row and a plot's group stand for: the tasks in their order, then their mean."""
    mean = bench.get("mean")
    return [*(bench.get("tasks") or {}).items(), *([("mean", mean)] if mean else [])]


def _methods(bench: Bench, field: str | None = None) -> list[str]:
    """The methods with a number for `field` in any group, in the order of `COLOURS`, unknown ones last."""
    rows = [row for _, row in _groups(bench)]
    seen = dict.fromkeys(m for row in rows for m in row if field is None or cell(row, m, field) is not None)
    order = list(COLOURS)
    return sorted(seen, key=lambda method: order.index(method) if method in order else len(order))


def _colours(bench: Bench) -> dict[str, str]:
    spare = itertools.cycle(MUTED)
    return {method: COLOURS.get(method) or next(spare) for method in _methods(bench)}


def main() -> None:
    """The command line."""
    command_line(ReportConfig, run)


if __name__ == "__main__":
    main()
