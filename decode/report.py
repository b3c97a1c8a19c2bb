"""Turns a benchmark into a page that needs nothing else, and the same plots as PNG files beside it.

python -m decode.report --bench bench.json --out report/

More files add a section in which their pools are compared; the rest of the page is about the first. `--throughput` and
`--growth` add what decode.throughput and decode.growth measured.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from decode import comparison, scaling
from decode.comparison import Compared
from decode.drawing import Bench, cell
from decode.plots import COMPARED, MEASURES, Plots, draw, groups_of, methods_of
from jaxspec.config import UserError, command_line
from jaxspec.store.curves import FIELDS, HELD

DASH = "—"
# What a part must hold as lists, if it is there.
NEEDED = {"confusion": ("tasks", "drafters", "counts"), "clusters": ("points", "cluster", "names")}
CHECKS = {"throughput": scaling.check_throughput, "growth": scaling.check_growth}
CONDITIONS = {"target": "target ", "device": "", "dtype": "", "batch": "batch ", "num_speculative_tokens": "K = "}
CONDITIONS |= {"temperature": "temperature ", "commit": "commit "}
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
        if not _are_curves(own):
            raise UserError(f"--bench {path}: the curves of {name} do not belong together; run decode.bench again")


def _is_table(confusion: Bench) -> bool:
    rows = confusion["counts"]
    across = len(confusion["drafters"])
    return len(rows) in (0, len(confusion["tasks"])) and all(
        isinstance(row, list) and len(row) == across for row in rows
    )


def _are_curves(course: Any) -> bool:
    if not isinstance(course, dict):
        return False
    columns = [own for key in ("step", *FIELDS) if isinstance(own := course.get(key), list)]
    alike = len(columns) == 1 + len(FIELDS) and len({len(own) for own in columns}) == 1
    return alike and (HELD not in course or _are_curves(course[HELD]))


def _are_points(clusters: Bench) -> bool:
    number = len(clusters["points"])
    known = range(len(clusters["names"]))
    there = len(clusters["cluster"]) == number and all(own in known for own in clusters["cluster"])
    labels = clusters.get("task") or []
    return there and len(labels) in (0, number) and all(np.shape(point) == (2,) for point in clusters["points"])


def page(
    bench: Bench,
    plots: Plots,
    compared: Sequence[Compared] = (),
    scaled: Mapping[str, Bench] = MappingProxyType({}),
) -> str:
    """The report as one HTML document that refers to nothing outside itself."""
    accuracy, over_autoregressive, over_base, *others = (_table(bench, field) for field in MEASURES)
    gain = "Wall clock, prefill and routing included; the dashed line is no gain."
    share = "Share accepted at each position of the block; a curve ends where no task had any more accepted."
    counts = "A row holds a task's prompts: colour is the share sent to each drafter, the number is the count."
    learnt = (
        "Alignment step by step on its training rows: the mean of a course's drafters, and each of several thinly. Dashed is "
        "their mean on texts that no drafter is trained on, where it was measured. Agreement is with the target's tokens."
    )
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
        "Means over tasks; a number is a pool of the table, whose methods stand side by side at its place. Tokens per second "
        "compare pools that one process has measured, speedups those of several."
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
    methods = methods_of(bench)
    groups = [[name, *(_number(cell(row, m, field), decimals) for m in methods)] for name, row in groups_of(bench)]
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


def main() -> None:
    """The command line."""
    command_line(ReportConfig, run)


if __name__ == "__main__":
    main()
