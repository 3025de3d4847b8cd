"""The report as a page: well-formed, self-contained, escaped, complete; and its drawing functions."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline import eval_ensemble, report
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.config import Config
from cbtm_pipeline.html import charts, page
from cbtm_pipeline.mixture import verdict
from made_run import change_json, make, make_config, make_report_inputs

QUICK = {
    "route": {"top_k": [1, 2, 9], "temperature": [0.1, 0.5], "epsilon": [0.01, 0.1], "beta": [1.0]},
    "eval": {"bootstrap": 200},
}
SECTIONS = ["Systems", "Routers", "Clusters", "Experts and clusters", "Training", "Compute", "The run"]


class Made(NamedTuple):
    folder: Path
    arguments: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "eval/metrics.json").read_text())


class Page(HTMLParser):
    """Collects what a reader sees; fails on elements that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in page.VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "h2" in self.open:
            self.headings[-1] += data
        if {"th", "td"} & set(self.open):
            self.cells[-1] += data


def run(main: Any, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["module", *arguments])
        handlers = list(cli.log.handlers)
        try:
            cli.run(main)
        finally:
            cli.log.handlers[:] = handlers


def make_run(folder: Path, cfg: Config) -> Made:
    files = make(folder, cfg)
    arguments = make_report_inputs(folder, cfg, files)
    run(eval_ensemble.main, files.arguments())
    return Made(folder, arguments)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def render(made: Made) -> str:
    run(report.main, made.arguments)
    return (made.folder / "report.html").read_text("utf-8")


def test_page_is_well_formed_and_stands_alone(made: Made):
    text = render(made)
    parsed = Page(text)
    assert parsed.headings == SECTIONS
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    assert not any(set(attributes) & {"src", "href", "onclick", "onload"} for _, attributes in parsed.tags)
    assert not re.search(r"https?:|//|url\(|@import", text.replace("<!doctype html>", ""))
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "nan" not in text.lower().split() and "None" not in parsed.text


def test_every_number_of_the_systems_is_there(made: Made):
    cells = Page(render(made)).cells
    for row in made.metrics["systems"]:
        at = [i for i, cell in enumerate(cells) if cell.removesuffix(" ★") == verdict.label(row)]
        expected = [
            str(report.decimals(row["perplexity"])),
            verdict.interval(row["ratio_to_dense"], row["ci95"]),
            verdict.interval(**row["ratios"]["dense-steps"]),
            f"{row['bits_per_byte']:.4f}",
            *(verdict.short(row[key]) for key in ("temperature", "epsilon", "beta")),
            "–" if row["n_active"] is None else str(row["n_active"]),
            str(report.flops(row["train_flops"])),
        ]
        assert expected in [cells[i + 1 : i + 10] for i in at]
    for line in [*made.metrics["matrix"]["perplexity"], made.metrics["matrix"]["dense"]]:
        assert set(map(report.decimals, line)) <= set(cells)


def test_the_claim_has_its_controls_beside_it_and_says_who_wins(made: Made):
    text = " ".join(Page(render(made)).text.split("Systems")[0].split())
    best = verdict.headline(made.metrics)
    assert (
        f"{best['ratio_to_dense']:.3f} times that of the dense model with a k times larger batch and 1.00 times its training FLOPs"
        in text
    )
    assert text.count("The ensemble wins.") == 1
    for name in ("seed", "dense", "dense-steps", "random, uniform", "uniform", "paper top-1", "oracle"):
        assert name in text.split("With its controls")[1]
    for sentence in made.metrics["verdict"][1:]:
        assert sentence in text

    for row in (metrics := made.metrics)["systems"]:
        row["ci95"] = [1.1, 1.2]
    artifact.write_json(made.folder / "eval/metrics.json", metrics)
    assert "Dense wins." in Page(render(made)).text


def test_text_from_data_is_escaped(made: Made):
    text = render(made)
    assert "<script" not in text
    assert "term2, <script>alert(1)</script>, &amp;, ünï" in Page(text).cells


def test_the_run_is_described(made: Made):
    parsed = Page(render(made))
    assert "17 rows of the input were left out" in parsed.text
    assert "balanced by tokens" in parsed.text
    for cells in (
        ["training text", "1\u202f234", "370\u202f200"],
        ["held-out text", "40"],
        ["reported on", "28"],
        ["chosen on", "12"],
    ):
        at = parsed.cells.index(cells[0])
        assert parsed.cells[at : at + len(cells)] == cells
    assert (
        "train.lr" in parsed.cells and "cluster.k" in parsed.cells and "run.log_seconds" not in parsed.cells
    )
    assert str(made.folder) not in parsed.text


def test_argument_order_changes_no_byte(made: Made):
    first = render(made)
    logs = made.arguments[made.arguments.index("--training") + 1 : made.arguments.index("--out")]
    arguments = [a for a in made.arguments if a not in logs]
    at = arguments.index("--training") + 1
    assert render(Made(made.folder, [*arguments[:at], *reversed(logs), *arguments[at:]])) == first


OTHERS = {
    "one expert": {"cluster": {"k": 1}},
    "many experts": {"cluster": {"k": 12}},
    "no controls, one setting": {
        "cluster": {"k": 2},
        "train": {"controls": [], "dense": "steps"},
        "route": {"routers": ["paper"], "top_k": [1], "temperature": [0.1]},
    },
    "a seed that was not trained": {"cluster": {"k": 2}, "model": {"pretrained": "some/folder"}},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_runs_have_a_page_too(case: str, tmp_path: Path):
    changed = OTHERS[case]
    sections = {**QUICK, **changed, "route": {**QUICK["route"], **changed.get("route", {})}}
    parsed = Page(render(make_run(tmp_path, make_config(outdir=str(tmp_path), **sections))))
    assert parsed.headings == SECTIONS
    assert ("random, uniform" in parsed.cells) == ("controls" not in changed.get("train", {}))


def test_an_empty_cluster_has_a_dash(made: Made):
    metrics = made.metrics
    metrics["matrix"]["dense"][1] = None
    for line in metrics["matrix"]["perplexity"]:
        line[1] = None
    artifact.write_json(made.folder / "eval/metrics.json", metrics)
    cells = Page(render(made)).cells
    at = cells.index("expert 0")
    assert cells[at + 2] == "–" and cells[at + 3] == report.decimals(metrics["matrix"]["perplexity"][0][2])


REFUSED = {
    "other terms": (
        "cluster/top_terms.json",
        {"made_from": {"clusterer": "0"}},
        "top_terms.json: made from another clusterer",
    ),
    "other shards": (
        "shards/manifest.json",
        {"n_quarantined": 3},
        "assignments/manifest.json: made from another shards",
    ),
    "other assignments": (
        "assignments/manifest.json",
        {"k": 4},
        "experts/0/card.json: made from another assignments",
    ),
    "retrained": ("experts/1/card.json", {"weights": "0"}, "experts/1/card.json: not the 1 of"),
    "not metrics": ("eval/metrics.json", {"kind": "scores"}, "metrics.json: scores. Expected metrics."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_of_one_run_is_refused_in_one_line(
    case: str, made: Made, capsys: pytest.CaptureFixture[str]
):
    path, change, expected = REFUSED[case]
    change_json(made.folder / path, **change)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        render(made)
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (made.folder / "report.html").exists()


def test_a_missing_or_damaged_log_is_refused(made: Made, capsys: pytest.CaptureFixture[str]):
    log = made.folder / "experts/2/metrics.jsonl"
    with pytest.raises(SystemExit):
        render(Made(made.folder, [a for a in made.arguments if a != str(log)]))
    assert "--training: no log of 2." in capsys.readouterr().err
    log.write_text('{"n_tokens": 1, "loss": 2}\n{"n_tok')
    with pytest.raises(SystemExit):
        render(made)
    assert f"{log}: line 2 is no row of a training log." in capsys.readouterr().err


@given(st.integers(0, 500), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_downsampling_keeps_range_and_mean(n_points: int, n: int):
    points = [(float(i), math.sin(i)) for i in range(n_points)]
    kept = report.downsample(points, n)
    assert len(kept) == min(n, n_points)
    assert kept == sorted(kept)
    if n_points % n == 0 and n_points:
        assert sum(b for _, b in kept) / len(kept) == pytest.approx(
            sum(b for _, b in points) / n_points, abs=1e-9
        )


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=100, deadline=None)
def test_ticks_are_few_round_and_inside(low: float, width: float):
    ticks = charts.nice_ticks(low, low + width)
    assert len(ticks) <= 8
    assert all(low - 1e-6 * width <= tick <= low + width + 1e-6 * width for tick in ticks)
    if width > 1e-3 * abs(low):
        assert len(ticks) >= 2
        step = ticks[1] - ticks[0]
        assert float(f"{step:.2g}") == pytest.approx(step, rel=1e-3)


def test_numbers_are_written_for_people():
    assert report.count(1234567.0) == "1\u202f234\u202f567"
    assert (
        report.flops(3.93e13) == "3.93·10¹³"
        and report.flops(0) == "0"
        and report.flops(2.5e-3) == "2.50·10⁻³"
    )
    assert report.decimals(None) == "–" and report.decimals(12345.678) == "12\u202f345.68"
    assert [charts.brief(x) for x in (0.05, 27.5, 12_000, 1.25e6, 3e13)] == [
        "0.05",
        "27.5",
        "12k",
        "1.25M",
        "30T",
    ]


points = st.lists(st.tuples(st.floats(0.01, 1e7), st.floats(0.5, 1e5)), min_size=1, max_size=20)


@given(st.lists(points, min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_everything_is_drawn_inside_the_picture(series: list[list[tuple[float, float]]], log_x: bool):
    drawn = charts.lines(
        "t",
        "x",
        "y",
        [charts.Series(str(i), "c0", sorted(p), dots=True) for i, p in enumerate(series)],
        log_x,
    )
    Page(drawn)
    marks = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)
    assert len(marks) == sum(map(len, series))
    for x, y in marks:
        assert (
            charts.LEFT <= float(x) <= charts.WIDTH - charts.RIGHT
            and charts.TOP <= float(y) <= charts.HEIGHT - charts.BOTTOM
        )


def test_lines_place_points_where_they_belong():
    drawn = charts.lines(
        "t", "x", "y", [charts.Series("a", "c0", [(1, 10), (10, 20), (100, 30)], dots=True)], log_x=True
    )
    (x1, y1), (x2, y2), (x3, y3) = (
        (float(x), float(y)) for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)
    )
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y1 > y2
    cut = charts.lines("t", "x", "y", [charts.Series("a", "c0", [(1, 1000), (2, 20), (3, 30)])], y_top=30)
    (path,) = re.findall(r'd="(M[^"]*)" class="line ', cut)
    assert path.count("L") == 1


def test_forest_orders_ratios_around_one():
    rows = [charts.Estimate(f"s{r}", r, [r - 0.05, r + 0.05], "c0") for r in (0.7, 1.0, 1.4)]
    drawn = charts.forest("t", rows)
    xs = [float(x) for x in re.findall(r'cx="([-\d.]+)"', drawn)]
    (one,) = re.findall(r'd="M([-\d.]+) [-\d.]+V[-\d.]+" class="one"', drawn)
    assert xs == sorted(xs) and xs[1] == pytest.approx(float(one), abs=0.11)
    intervals = re.findall(r'd="M([-\d.]+) [-\d.]+v8m0 -4H([-\d.]+)m0 -4v8"', drawn)
    assert all(float(low) < x < float(high) for (low, high), x in zip(intervals, xs, strict=True))
    Page(charts.forest("t", [charts.Estimate("a", 1.0, [1.0, 1.0], "c0")]))


def test_elements_escape_what_they_hold():
    assert page.tag("p", 'a<b & "c"', title='"<') == '<p title="&quot;&lt;">a&lt;b &amp; &quot;c&quot;</p>'
    assert page.tag("p", page.tag("b", 1), class_="x", aria_label=None) == '<p class="x"><b>1</b></p>'
    assert page.table(["<"], [["<i>"]]).count("&lt;") == 2
