"""The report as a page: well-formed, self-contained, escaped, complete."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline import report
from cbtm_pipeline.base import artifact
from cbtm_pipeline.config import Config
from cbtm_pipeline.html import page
from cbtm_pipeline.mixture import verdict
from made_run import QUICK, change_json, evaluate, make, make_config, make_report_inputs, render
from parsed_page import Page

SECTIONS = ["Systems", "Routers", "Clusters", "Experts and clusters", "Training", "Compute", "The run"]


class Made(NamedTuple):
    folder: Path
    arguments: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "eval/metrics.json").read_text())


def make_run(folder: Path, cfg: Config) -> Made:
    files = make(folder, cfg)
    arguments = make_report_inputs(folder, cfg, files)
    evaluate(files)
    return Made(folder, arguments)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def test_page_is_well_formed_and_stands_alone(made: Made):
    text = render(made.arguments)
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
    cells = Page(render(made.arguments)).cells
    for row in made.metrics["systems"]:
        at = [i for i, cell in enumerate(cells) if cell.removesuffix(" ★") == verdict.label(row)]
        expected = [
            str(page.decimals(row["perplexity"])),
            verdict.interval(row["ratio_to_dense"], row["ci95"]),
            verdict.interval(**row["ratios"]["dense-steps"]),
            f"{row['bits_per_byte']:.4f}",
            *(verdict.short(row[key]) for key in ("temperature", "epsilon", "beta")),
            "–" if row["n_active"] is None else str(row["n_active"]),
            str(page.flops(row["train_flops"])),
        ]
        assert expected in [cells[i + 1 : i + 10] for i in at]
    for line in [*made.metrics["matrix"]["perplexity"], made.metrics["matrix"]["dense"]]:
        assert set(map(page.decimals, line)) <= set(cells)


def test_the_claim_has_its_controls_beside_it_and_says_who_wins(made: Made):
    text = " ".join(Page(render(made.arguments)).text.split("Systems")[0].split())
    best = verdict.headline(made.metrics)
    assert (
        f"{best['ratio_to_dense']:.3f} times that of the dense model with a k times larger batch "
        "and 1.00 times its training FLOPs"
    ) in text
    assert text.count("The ensemble wins.") == 1
    for name in ("seed", "dense", "dense-steps", "random, uniform", "uniform", "paper top-1", "oracle"):
        assert name in text.split("With its controls")[1]
    for sentence in made.metrics["verdict"][1:]:
        assert sentence in text

    for row in (metrics := made.metrics)["systems"]:
        row["ci95"] = [1.1, 1.2]
    artifact.write_json(made.folder / "eval/metrics.json", metrics)
    assert "Dense wins." in Page(render(made.arguments)).text


def test_text_from_data_is_escaped(made: Made):
    text = render(made.arguments)
    assert "<script" not in text
    assert "term2, <script>alert(1)</script>, &amp;, ünï" in Page(text).cells


def test_the_run_is_described(made: Made):
    parsed = Page(render(made.arguments))
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
    first = render(made.arguments)
    logs = made.arguments[made.arguments.index("--training") + 1 : made.arguments.index("--out")]
    arguments = [a for a in made.arguments if a not in logs]
    at = arguments.index("--training") + 1
    assert render([*arguments[:at], *reversed(logs), *arguments[at:]]) == first


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
    parsed = Page(render(make_run(tmp_path, make_config(outdir=str(tmp_path), **sections)).arguments))
    assert parsed.headings == SECTIONS
    assert ("random, uniform" in parsed.cells) == ("controls" not in changed.get("train", {}))


def test_an_empty_cluster_has_a_dash(made: Made):
    metrics = made.metrics
    metrics["matrix"]["dense"][1] = None
    for line in metrics["matrix"]["perplexity"]:
        line[1] = None
    artifact.write_json(made.folder / "eval/metrics.json", metrics)
    cells = Page(render(made.arguments)).cells
    at = cells.index("expert 0")
    assert cells[at + 2] == "–" and cells[at + 3] == page.decimals(metrics["matrix"]["perplexity"][0][2])


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
        render(made.arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (made.folder / "report.html").exists()


def test_a_missing_or_damaged_log_is_refused(made: Made, capsys: pytest.CaptureFixture[str]):
    log = made.folder / "experts/2/metrics.jsonl"
    with pytest.raises(SystemExit):
        render([a for a in made.arguments if a != str(log)])
    assert "--training: no log of 2." in capsys.readouterr().err
    log.write_text('{"n_tokens": 1, "loss": 2}\n{"n_tok')
    with pytest.raises(SystemExit):
        render(made.arguments)
    assert f"{log}: line 2 is not a row of a training log." in capsys.readouterr().err


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
