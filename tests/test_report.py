"""A report shows what the bench holds: every number, nothing invented, nothing fetched, nothing clipped."""

import base64
import copy
import html.parser
import io
import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image

from decode import plots, report
from decode.drawing import COLOURS
from jaxspec.config import UserError

METHODS = ["autoregressive", "base", "mixed", "routed", "random", "wrong", "oracle"]
SHOWN = {
    "Draft accuracy": "draft_accuracy",
    "Speedup against autoregressive": "speedup_vs_autoregressive",
    "Speedup against base": "speedup_vs_base",
}
PLOTS = ["draft_accuracy", "speedup", "acceptance_by_position", "router_confusion", "clusters", "training"]
EVIL = "<script>alert('$\\x$')</script>&\"><img src=http://x>"


def make_bench(tasks=("code", "sql"), methods=("autoregressive", "base", "routed"), k=3):
    """A bench in which every number is drawn at random, so that two of them hardly ever look alike."""
    rng = np.random.default_rng(0)
    num_points = 5 * len(tasks)
    cluster = [i % len(tasks) for i in range(num_points)]

    def result():
        ratios = ["draft_accuracy", "draft_acceptance_rate", "speedup_vs_autoregressive", "speedup_vs_base"]
        seconds = ["seconds", "prefill_seconds", "decode_seconds", "mean_acceptance_length"]
        row = {field: float(rng.uniform(0.1, 2.0)) for field in ratios + seconds}
        row |= {"prompts": 40, "tokens": 2000, "equal_to_autoregressive": 1.0, "equal_to_fastest_autoregressive": 0.975}
        return row | {"acceptance_by_position": rng.uniform(0, 1, k).tolist()}

    return {
        "schema": 1, "target": "target-40m", "device": "NVIDIA H200", "dtype": "bfloat16", "batch": 1,
        "num_speculative_tokens": k, "temperature": 0.7, "commit": "3f9c2d1", "pool": "runs/pool", "autoregressive_width": 2,
        "max_new_tokens": 96, "passes": 3,
        "tasks": {task: {method: result() for method in methods} for task in tasks},
        "mean": {method: result() for method in methods},
        "router": {
            "accuracy": 0.9, "milliseconds": 0.4, "share_of_time_to_first_token": 0.01, "fallback_rate": 0.1,
            "confusion": {
                "tasks": list(tasks), "drafters": ["base", *tasks],
                "counts": rng.integers(0, 50, (len(tasks), len(tasks) + 1)).tolist(),
            },
        },
        "clusters": {
            "points": rng.normal(size=(num_points, 2)).tolist(), "cluster": cluster,
            "task": [tasks[i] for i in cluster], "names": [f"cluster-{i}" for i in range(len(tasks))],
        },
        "curves": {
            name: {"step": [10, 20, 25], **{field: rng.random((3, own)).tolist() for field in ("loss", "agreement")}}
            for name, own in (("trunk", 1), ("bank", len(tasks)))
        },
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: elements, what they refer to, tables as {caption: {row: {column: text}}}."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.references, self.tables, self.captions, self.text = [], [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.text.append(data)
        element = self.elements[-1] if self.elements else None
        if element == "caption":
            self.caption = data
        elif element in ("td", "th") and data.strip():
            self.rows[-1].append(data)
        elif element == "figcaption":
            self.captions.append(data)

    def handle_endtag(self, tag):
        if tag == "table":
            head, *rows = self.rows
            self.tables[self.caption] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def write_report(tmp_path, bench):
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    report.run(report.ReportConfig(bench=(tmp_path / "bench.json",), out=tmp_path / "out"))
    return tmp_path / "out"


def read_page(bench):
    return Page(report.page(bench, dict.fromkeys(PLOTS)))


def draw_figures(bench, monkeypatch):
    """The figures before they become pixels, laid out."""
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or figure.draw_without_rendering())
    plots.draw(bench)
    return figures


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def has_colour(picture, colour):
    return (pixels(picture) == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).any()


def test_every_number_is_in_its_cell():
    bench = make_bench(methods=[*METHODS, "ngram"])
    tables = read_page(bench).tables
    for caption, field in SHOWN.items():
        for task, row in [*bench["tasks"].items(), ("mean", bench["mean"])]:
            assert tables[caption][task].keys() == row.keys()
            for method, text in tables[caption][task].items():
                decimals = len(text.partition(".")[2])
                assert decimals >= 2
                assert abs(float(text) - row[method][field]) <= 0.5000001 * 10**-decimals


def test_a_text_that_differs_is_never_rounded_away():
    bench = make_bench()
    bench["tasks"]["sql"]["routed"]["equal_to_autoregressive"] = 0.99996
    cells = [table["sql"].get("routed") for table in read_page(bench).tables.values() if "sql" in table]
    assert "0.99996" in cells


def test_the_page_holds_its_pictures_and_needs_nothing_else(tmp_path):
    out = write_report(tmp_path, make_bench())
    text = (out / "report.html").read_text()
    page = Page(text)
    inside = [base64.b64decode(reference.removeprefix("data:image/png;base64,")) for reference in page.references]
    beside = [file.read_bytes() for file in out.glob("*.png")]
    assert sorted(inside) == sorted(beside)
    assert len(inside) == len(PLOTS)
    assert not {"script", "link", "iframe", "object"} & set(page.elements)
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_the_conditions_stand_above_every_figure(tmp_path):
    page = Page((write_report(tmp_path, make_bench()) / "report.html").read_text())
    assert len(page.captions) == page.elements.count("img") == len(PLOTS)
    for word in ["target target-40m", "H200", "bfloat16", "batch 1", "K = 3", "temperature 0.7", "3f9c2d1"]:
        assert all(word in caption for caption in page.captions)


def test_pictures_show_something(tmp_path):
    for file in write_report(tmp_path, make_bench()).glob("*.png"):
        image = pixels(file.read_bytes())
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image @ [65536, 256, 1])) > 20


def test_names_are_text_not_markup(tmp_path):
    bench = make_bench(tasks=[EVIL], methods=["base", EVIL]) | {"device": EVIL, "commit": EVIL, "pool": EVIL}
    bench["clusters"]["names"] = [EVIL]
    page = Page((write_report(tmp_path, bench) / "report.html").read_text())
    assert page.elements.count("img") == len(PLOTS) and "script" not in page.elements
    assert EVIL in page.tables["Draft accuracy"][EVIL]
    assert "".join(page.text).count(EVIL) >= 3


def test_null_is_a_dash_and_never_a_bar(monkeypatch):
    bench = make_bench()
    bench["tasks"]["sql"]["routed"] = dict.fromkeys(bench["tasks"]["sql"]["routed"])
    for table in read_page(bench).tables.values():
        assert set(table.get("sql", {}).get("routed", report.DASH)) == {report.DASH}
    accuracy = draw_figures(bench, monkeypatch)[0].axes[0]
    drawn = np.array([[bar.get_height() for bar in bars] for bars in accuracy.containers])
    assert np.isnan(drawn).sum() == 1


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ("tasks", []),
        ("mean", []),
        ("router", ["router_confusion"]),
        ("clusters", ["clusters"]),
        ("curves", ["training"]),
    ],
)
def test_a_part_that_is_null_costs_its_own_plot_only(part, lost):
    bench = make_bench() | {part: None}
    drawn = plots.draw(bench)
    assert [name for name, picture in drawn.items() if picture is None] == lost
    assert [name for name in PLOTS if f"{name}.png" in report.page(bench, drawn)] == lost


def test_any_condition_may_be_null():
    bench = make_bench()
    conditions = {
        field: None for field in bench if field not in ("schema", "tasks", "mean", "router", "clusters", "curves")
    }
    assert "".join(read_page(bench | conditions).text).count(report.DASH) == len(conditions)


def test_a_bench_of_nulls_says_what_it_leaves_out(tmp_path):
    full, empty = make_bench(), make_bench()
    for row in [*empty["tasks"].values(), empty["mean"]]:
        row.update({method: dict.fromkeys(fields) for method, fields in row.items()})
    write_report(tmp_path, full)
    out = write_report(tmp_path, empty | {"router": None, "clusters": None, "curves": None})  # over the full one
    text = (out / "report.html").read_text()
    assert not list(out.glob("*.png"))
    assert all(f"{name}.png" in text for name in PLOTS)


def test_bars_are_as_high_as_the_numbers(monkeypatch):
    bench = make_bench(methods=["oracle", "routed", "base", "ngram"])
    rows = [*bench["tasks"].values(), bench["mean"]]
    accuracy, speedup, *_ = draw_figures(bench, monkeypatch)
    for axis, field in zip([*accuracy.axes, *speedup.axes], SHOWN.values(), strict=True):
        for bars, text in zip(axis.containers, axis.figure.legends[0].get_texts(), strict=True):
            assert [bar.get_height() for bar in bars] == [row[text.get_text()][field] for row in rows]


def test_a_method_has_its_own_colour_whoever_stands_beside_it():
    drawn = {len(chosen): plots.draw(make_bench(methods=chosen)) for chosen in (["oracle", "routed"], METHODS)}
    for name in ["draft_accuracy", "speedup", "acceptance_by_position"]:
        for method in METHODS[1:]:  # smoothed letters are as grey as autoregressive
            assert has_colour(drawn[2][name], COLOURS[method]) == (method in ("oracle", "routed"))
            assert has_colour(drawn[7][name], COLOURS[method])


@pytest.mark.parametrize("k", [1, 4, 16])
def test_positions_are_whole_numbers(k, monkeypatch):
    for axis in draw_figures(make_bench(k=k), monkeypatch)[2].axes:
        low, high = axis.get_xlim()
        assert {round(x, 6) for x in axis.get_xticks() if low <= x <= high} <= set(range(1, k + 1))
        assert low < 1 <= k < high


def test_confusion_compares_shares_not_counts(monkeypatch):
    bench = make_bench()
    bench["router"]["confusion"]["counts"] = [[1, 3, 0], [100, 300, 0]]
    axis = draw_figures(bench, monkeypatch)[3].axes[0]
    first, second = axis.images[0].get_array()
    np.testing.assert_allclose(first, [0.25, 0.75, 0.0])
    np.testing.assert_allclose(second, first)
    assert [text.get_text() for text in axis.texts] == ["1", "3", "0", "100", "300", "0"]


def test_training_is_drawn_step_by_step_as_the_mean_of_a_courses_drafters(monkeypatch):
    bench = make_bench(tasks=("code", "sql", "chat"))
    figure = draw_figures(bench, monkeypatch)[PLOTS.index("training")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(bench["curves"])
    for axis, field in zip(figure.axes, ("loss", "agreement"), strict=True):
        trunk, bank = (np.array(own[field]) for own in bench["curves"].values())
        lines = [trunk[:, 0], bank.mean(1), *bank.T]
        assert len(axis.lines) == len(lines) and axis.get_ylabel() == field
        for drawn, expected in zip(axis.lines, lines, strict=True):
            np.testing.assert_allclose(drawn.get_xydata(), np.stack([[10, 20, 25], expected], 1))


def test_what_is_held_out_is_drawn_dashed_beside_what_is_trained_on(monkeypatch):
    bench, rng = make_bench(), np.random.default_rng(1)
    held = {"step": [0, 25], **{field: rng.random((2, 2)).tolist() for field in ("loss", "agreement")}}
    bench["curves"]["bank"]["held"] = held
    figure = draw_figures(bench, monkeypatch)[PLOTS.index("training")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trunk", "bank", "trained on", "held out"]
    for axis, field in zip(figure.axes, ("loss", "agreement"), strict=True):
        (dashed,) = (line for line in axis.lines if line.get_linestyle() == "--")
        np.testing.assert_allclose(dashed.get_xydata(), np.stack([[0, 25], np.mean(held[field], 1)], 1))
        assert dashed.get_color() == next(line for line in axis.lines[1:] if line.get_linewidth() == 2).get_color()


@pytest.mark.parametrize("part", ["trained on", "held out"])
def test_curves_of_different_lengths_are_refused(part, tmp_path):
    bench = make_bench()
    bank = bench["curves"]["bank"]
    bank["held"] = copy.deepcopy(bank)
    (bank if part == "trained on" else bank["held"])["loss"].pop()
    with pytest.raises(UserError, match="the curves of bank do not belong together"):
        write_report(tmp_path, bench)


def test_a_curve_ends_where_no_task_had_more_accepted(monkeypatch):
    bench = make_bench(k=5)
    for at, task in enumerate(("code", "sql")):
        bench["tasks"][task]["routed"]["acceptance_by_position"][2 + at :] = [0.0] * (3 - at)
    bench["mean"]["routed"]["acceptance_by_position"][3:] = [0.0, 0.0]
    for axis in draw_figures(bench, monkeypatch)[2].axes:
        assert [len(line.get_xdata()) for line in axis.lines] == [5, 5, 3]


def test_no_two_of_nineteen_methods_look_alike(monkeypatch):
    methods = [*METHODS, *(f"added {i}" for i in range(12))]
    axis = draw_figures(make_bench(methods=methods), monkeypatch)[0].axes[0]
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axis.containers]
    assert len(set(looks)) == len(methods)


@pytest.mark.parametrize("num_tasks", [1, 8])
@pytest.mark.parametrize("name", ["t", "a task whose name is long {}"])
def test_nothing_is_clipped_and_no_names_overlap(num_tasks, name, monkeypatch):
    tasks = [name.format(i) + str(i) for i in range(num_tasks)]
    figures = draw_figures(make_bench(tasks, METHODS, k=1), monkeypatch)
    assert all(len(figure.legends) == 1 for figure in figures[:3])
    for figure in figures:
        content, paper = figure.get_tightbbox(), figure.bbox_inches
        assert content.x0 > -0.02 and content.y0 > -0.02
        assert content.x1 < paper.x1 + 0.02 and content.y1 < paper.y1 + 0.02
        for legend in figure.legends:
            assert 0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= figure.bbox.x1
        for axis in figure.axes:
            boxes = [x.get_window_extent() for x in axis.get_xticklabels() if not x.get_rotation() and x.get_visible()]
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (None, "No such file"),
        ("{oops", "not JSON"),
        ("[1]", "schema None"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": "one"}', "schema 'one'"),
    ],
)
def test_a_wrong_bench_ends_in_one_sentence(content, received, tmp_path, monkeypatch, capsys):
    bench = tmp_path / "bench.json"
    if content is not None:
        bench.write_text(content)
    leave_with_two(["--bench", str(bench), "--out", str(tmp_path / "out")], monkeypatch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(bench) in said and received in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    bench, out = tmp_path / "bench.json", tmp_path / "taken"
    bench.write_text(json.dumps(make_bench()))
    out.write_text("a file, not a folder")
    leave_with_two(["--bench", str(bench), "--out", str(out)], monkeypatch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(out) in said


def leave_with_two(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit) as left:
        report.main()
    assert left.value.code == 2


def test_drawing_does_not_change_the_bench():
    bench = make_bench()
    before = copy.deepcopy(bench)
    report.page(bench, plots.draw(bench))
    assert bench == before
