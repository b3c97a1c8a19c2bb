"""Pools compared: every number in its cell and at its place, and the page about the first bench is the page of it alone."""

import json

import numpy as np
import pytest
from test_report import Page, leave_with_two, make_bench

from decode import comparison, report
from decode.drawing import COLOURS

SIZES = {"small.json": (1_400_000, 8), "large.json": (5_000_000, 4)}


def sized(parameters, num_tasks, *, methods, **said):
    """A bench that says what its pool is; each has other numbers."""
    bench = make_bench(methods=methods) | {"drafter_parameters": parameters, "num_tasks": num_tasks}
    for row in bench["mean"].values():
        row.update({field: row[field] * (1 + num_tasks / 10) for field in ("seconds", "draft_accuracy")})
    return bench | {"training": {"steps": 100 * num_tasks, "trunk": 0.4}} | said


@pytest.fixture
def benches():
    """Two files, the second with a rival."""
    small = sized(*SIZES["small.json"], methods=("autoregressive", *comparison.METHODS))
    large = sized(*SIZES["large.json"], methods=("autoregressive", "base", "mixed", "routed"))
    large["mean"] |= {"paper": small["mean"]["mixed"], "paper/base": small["mean"]["routed"]}
    large["rivals"] = {"paper": {"drafter_parameters": 900_000, "num_tasks": 2, "training": None}}
    return {"small.json": small, "large.json": large}


def figures_of(bench, row):
    own = bench["mean"][row]
    return [own["tokens"] / own["seconds"], own["speedup_vs_autoregressive"], own["draft_accuracy"]]


def expected(benches):
    """Of each pool its drafter's millions of parameters, its tasks, and its figures by method."""
    small, large = benches.values()
    own = {method: method for method in comparison.METHODS}
    rows = [
        ((1.4, 8), small, own),
        ((5.0, 4), large, own),
        ((0.9, 2), large, {"base": "paper/base", "routed": "paper"}),
    ]
    there = lambda bench, named: {method: row for method, row in named.items() if row in bench["mean"]}
    figures = lambda bench, named: {method: figures_of(bench, row) for method, row in there(bench, named).items()}
    return [(*x, figures(bench, named)) for x, bench, named in rows]


def write(folder, benches):
    for name, bench in benches.items():
        (folder / name).write_text(json.dumps(bench))
    report.run(report.ReportConfig(bench=tuple(folder / name for name in benches), out=folder / "out"))
    return (folder / "out" / "report.html").read_text()


def test_every_figure_is_in_its_cell(benches, tmp_path):
    table = Page(write(tmp_path, benches)).tables["Pools compared"]
    assert [name.split("/")[-1] for name in table] == ["small.json", "large.json", "large.json: paper"]
    for row, (parameters, num_tasks, figures) in zip(table.values(), expected(benches), strict=True):
        assert (row["drafter's parameters"], row["tasks"]) == (f"{parameters * 1e6:,.0f}", str(num_tasks))
        for method in comparison.METHODS:
            cells = [row[f"{method}: {heading.lower()}"] for heading in comparison.MEASURES.values()]
            assert cells == [f"{value:.3f}" for value in figures[method]] if method in figures else [report.DASH] * 3
    steps = [row["steps"] for row in table.values()]
    assert steps == ["800", "400", report.DASH]


def test_points_stand_where_the_figures_are(benches):
    panels = np.reshape(comparison.draw(comparison.pools(benches)).axes, (3, 2))
    for measure, row in enumerate(panels):
        for x, panel in enumerate(row):
            for method, line in zip(comparison.METHODS, panel.lines, strict=False):
                there = [(own[x], own[2][method][measure]) for own in expected(benches) if method in own[2]]
                np.testing.assert_allclose(line.get_xydata(), there)
                assert line.get_color() == COLOURS[method]
    numbers = [text.get_text() for text in panels[0, 0].texts]
    assert numbers == ["1", "2", "3", "1", "2", "1", "2", "3", "1"]


def test_methods_of_a_pool_stand_apart_and_only_those_measured_are_named(benches):
    figure = comparison.draw(comparison.pools(benches))
    figure.draw_without_rendering()
    first = [line.get_transform().transform(line.get_xydata())[0, 0] for line in figure.axes[0].lines]
    steps = np.diff(first) / figure.dpi * 72
    np.testing.assert_allclose(steps, comparison.BESIDE)
    large = figure_of(benches, "large.json")
    assert [text.get_text() for text in large.legends[0].get_texts()] == ["base", "mixed", "routed"]


def figure_of(benches, name):
    return comparison.draw(comparison.pools({name: benches[name]}))


def test_the_rest_of_the_page_is_about_the_first_bench(benches, tmp_path):
    alone, together = (write(tmp_path, own) for own in ({"small.json": benches["small.json"]}, benches))
    begin, end = together.index("<h2>Pools compared"), together.index("<h2>Other measures")
    assert together[:begin] + together[end:] == alone


def test_a_report_of_one_pool_leaves_no_comparison_of_an_older_one(benches, tmp_path):
    assert "pools_compared" not in write(tmp_path, benches) and (tmp_path / "out" / "pools_compared.png").exists()
    write(tmp_path, {"small.json": benches["small.json"]})
    assert not (tmp_path / "out" / "pools_compared.png").exists()


def test_a_bench_with_a_rival_compares_its_own_pools(benches, tmp_path):
    assert len(Page(write(tmp_path, {"large.json": benches["large.json"]})).tables["Pools compared"]) == 2


def test_a_bench_that_does_not_say_what_its_pool_is_has_a_row_and_no_place(benches, tmp_path):
    old = {"old.json": make_bench()}
    lines = comparison.draw(comparison.pools(benches | old)).axes[0].lines
    assert [len(line.get_xdata()) for line in lines[:3]] == [3, 2, 3]
    text = write(tmp_path, old | {"older.json": make_bench()})
    assert "pools_compared.png, so that plot is left out" in text
    row = Page(text).tables["Pools compared"]
    assert {own["tasks"] for own in row.values()} == {report.DASH}
    accuracy = make_bench()["mean"]["routed"]["draft_accuracy"]
    assert {own["routed: draft accuracy"] for own in row.values()} == {f"{accuracy:.3f}"}


def test_nothing_of_a_comparison_is_clipped(benches):
    figure = comparison.draw(comparison.pools(benches))
    figure.draw_without_rendering()
    content, paper = figure.get_tightbbox(), figure.bbox_inches
    assert content.x0 > -0.02 and content.y0 > -0.02 and content.x1 < paper.x1 + 0.02 and content.y1 < paper.y1 + 0.02


@pytest.mark.parametrize("rivals", [["paper"], {"paper": 3}])
def test_rivals_that_are_no_pools_end_in_one_sentence(rivals, benches, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(benches["small.json"] | {"rivals": rivals}))
    leave_with_two(["--bench", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")], monkeypatch)
    assert "rivals" in capsys.readouterr().err


def test_no_bench_at_all_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    leave_with_two(["--bench", "--out", str(tmp_path / "out")], monkeypatch)
    assert "--bench is empty" in capsys.readouterr().err
