"""Plots of throughput and growth hold what was measured: every point, each method's knee, each axis beside its floor."""

import itertools
import json

import numpy as np
import pytest

from decode import report, scaling
from jaxspec.config import UserError
from tests.test_report import Page, make_bench, pixels

SLOTS = [1, 4, 16, 64, 128]
RATES = {
    "autoregressive": [10.0, 38.0, 90.0, 97.0, 100.0],
    "base": [9.0, 30.0, 60.0, 59.0, 50.0],
    "mixed": [15.0, 45.0, 80.0, 85.0, 80.0],
    "one route": [16.0, 46.0, 81.0, 86.0, 81.0],
    "routed": [17.0, 44.0, 78.0, 80.0, 70.0],
}
BEST = [4, 2, 0, 0, 0]
KNEES = {"autoregressive": 16, "base": 16, "mixed": 16, "one route": 16, "routed": 16, scaling.BEST: 64}
VALUES = {
    "context": [64, 8192],
    "tasks": [1, 64],
    "drafted": [0, 16],
    "vocabulary": [8192, 131072],
    "prefill": [64, 2048],
}


def throughput(by_length=True):
    """A file of decode.throughput."""
    rows = [{"slots": n, **{m: {"tokens_per_second": r[i]} for m, r in RATES.items()}} for i, n in enumerate(SLOTS)]
    for i, row in enumerate(rows if by_length else ()):
        others = {str(k): float(k) for k in (0, 2, 4) if k != BEST[i]}
        row |= {"by_length": {**others, str(BEST[i]): max(own[i] for own in RATES.values()) - 1}, "best": BEST[i]}
    return {
        "target": "target-40m",
        "device": "NVIDIA H100",
        "dtype": "bfloat16",
        "num_speculative_tokens": 4,
        "rows": rows,
    }


def growth():
    """A file of decode.growth."""
    rng = np.random.default_rng(0)
    row = lambda value: {"value": value, "floor": rng.random() / 1e3, "seconds": (1 + rng.random()) / 1e3}
    axes = {name: {"device": "NVIDIA H100", "rows": [row(own) for own in values]} for name, values in VALUES.items()}
    for own in axes["prefill"]["rows"]:
        own |= {"tokens_per_second": 1e4 * rng.random(), "flop_utilisation": rng.random()}
        own |= {"first_token": {"seconds": rng.random() / 100}}
    programs = [{"program": name, "cold": 3.25, "cached": 0.5} for name in ("prefill, 1 x 128 tokens (K = 4)", "chunk")]
    axes["compile"] = {"device": "NVIDIA H100", "rows": programs}
    settings = {"slots": 8, "cached": 128, "dtype": "bfloat16", "num_speculative_tokens": 4}
    return {"schema": 1, "settings": settings, "axes": axes}


def write(tmp_path, **files):
    """A report on a bench and these files."""
    named = {name: tmp_path / f"{name}.json" for name in ("bench", *files)}
    for name, own in {"bench": make_bench(), **files}.items():
        named[name].write_text(json.dumps(own))
    bench = named.pop("bench")
    report.run(report.ReportConfig(bench=(bench,), out=tmp_path / "out", **named))
    return tmp_path / "out"


@pytest.mark.parametrize(
    "rates, at", [([1, 2, 4, 8], 8), ([5, 9.1, 10, 9.9], 2), ([9, 9.5, 10, 2], 1), ([3, 8, 8.9, 10], 8)]
)
def test_the_knee_is_where_nine_tenths_of_the_most_are_reached(rates, at):
    assert scaling.knee([1, 2, 4, 8], rates) == at


def test_throughput_is_drawn_point_by_point_with_each_methods_knee():
    figure = scaling.draw_throughput(throughput())
    (axis,) = figure.axes
    rates = scaling.by_method(throughput())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(rates) and len(rates) == 6
    for (name, heights), curve, ring in zip(rates.items(), axis.lines[::2], axis.lines[1::2], strict=True):
        np.testing.assert_array_equal(curve.get_xydata(), np.stack([SLOTS, heights], 1))
        at = KNEES[name]
        assert ring.get_xydata().tolist() == [[at, heights[SLOTS.index(at)]]]
    assert [text.get_text() for text in axis.texts] == [f"K = {k}" for k in BEST]


def test_every_axis_is_drawn_beside_its_floor():
    own = growth()
    figure = scaling.draw_growth(own)
    panels = dict(zip([*VALUES, "compile"], figure.axes, strict=True))
    for name, values in VALUES.items():
        measured, floor, *first = panels[name].lines
        rows = own["axes"][name]["rows"]
        for line, field in ((measured, "seconds"), (floor, "floor")):
            np.testing.assert_allclose(
                line.get_xydata(), [[v, 1e3 * row[field]] for v, row in zip(values, rows, strict=True)]
            )
        assert len(first) == (name == "prefill")
    assert [bar.get_width() for bars in panels["compile"].containers for bar in bars] == [3.25, 3.25, 0.5, 0.5]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["measured", "floor", "to the first token"]


def test_the_page_has_both_and_nothing_of_an_older_one(tmp_path):
    out = write(tmp_path, throughput=throughput(), growth=growth())
    page = Page((out / "report.html").read_text())
    assert "at least 90% of its most tokens per second" in "".join(page.text)
    table = page.tables["Tokens per second by slots"]
    assert table["knee, slots"]["base"] == "16" and float(table["64"]["mixed"]) == 85 and table["1"]["best K"] == "4"
    reading = page.tables["Growth: prefill"]["2,048"]
    row = growth()["axes"]["prefill"]["rows"][1]
    assert float(reading["model FLOP utilisation"]) == pytest.approx(row["flop_utilisation"], abs=5e-4)
    assert page.tables["Seconds of compiling"]["chunk"] == {"cold": "3.250", "cached": "0.500"}
    assert any("NVIDIA H100" in own and "cached 128" in own for own in page.captions)
    for name in ("throughput", "growth"):
        assert len(np.unique(pixels((out / f"{name}.png").read_bytes()) @ [65536, 256, 1])) > 20
    write(tmp_path)
    text = (out / "report.html").read_text()
    assert not (out / "growth.png").exists() and not (out / "throughput.png").exists() and "Growth" not in text


def test_files_without_some_parts_are_drawn_all_the_same(tmp_path):
    few = growth() | {"axes": {"tasks": growth()["axes"]["tasks"]}}
    page = Page((write(tmp_path, throughput=throughput(False), growth=few) / "report.html").read_text())
    assert "best K" not in page.tables["Tokens per second by slots"]["1"]
    assert [name for name in page.tables if name.startswith("Growth")] == ["Growth: tasks"]


def test_nothing_is_clipped_and_no_names_overlap():
    for figure in (scaling.draw_throughput(throughput()), scaling.draw_growth(growth())):
        figure.draw_without_rendering()
        content, paper = figure.get_tightbbox(), figure.bbox_inches
        assert min(content.x0, content.y0) > -0.02
        assert content.x1 < paper.x1 + 0.02 and content.y1 < paper.y1 + 0.02
        for axis in figure.axes:
            boxes = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    "name, own, sentence",
    [
        ("throughput", {"rows": []}, "has no rows by slots; give the file of decode.throughput's --json"),
        ("throughput", [1], "has no rows by slots"),
        (
            "growth",
            {"axes": {"tasks": {"rows": []}}},
            "has no axes of growth; give the file of decode.growth's --output",
        ),
        ("growth", {"axes": {}, "settings": {}}, "has no axes of growth"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(name, own, sentence, tmp_path):
    with pytest.raises(UserError, match=f"--{name} .*{sentence}"):
        write(tmp_path, **{name: own})
    assert not (tmp_path / "out").exists()
