"""`cbtm clusters`: the table of clusters."""

import json
from pathlib import Path

import pytest

import made_ensemble as made
from cbtm_pipeline import clusters
from resealed import change_json


@pytest.fixture
def outdir(tmp_path: Path) -> Path:
    return made.write(tmp_path / "results")


def test_each_cluster_has_a_line(outdir: Path, capsys) -> None:
    assert made.command(clusters.main, "--outdir", outdir) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["cluster", "documents", "tokens"]
    assert [line.split() for line in lines] == [
        ["0", "10", "1,000", "16.7", "%", "3.500", "butter", "flour"],
        ["1", "10", "2,000", "33.3", "%", "3.500", "ship", "mast"],
        ["2", "10", "3,000", "50.0", "%", "3.500", "rose", "soil"],
    ]


def test_programs_get_the_same(outdir: Path, capsys) -> None:
    assert made.command(clusters.main, "--outdir", outdir, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["n_tokens"] for row in rows] == [1000, 2000, 3000]
    assert rows[1]["top_terms"] == ["ship", "mast"] and rows[1]["validation_loss"] == 3.5


def test_where_documents_have_labels_each_cluster_shows_its_own(outdir: Path, capsys) -> None:
    counts = {"names": ["news", "m\x1bail", ""], "n_documents": [[9, 1, 0], [5, 5, 0], [0, 0, 10]]}
    change_json(outdir / "assignments/manifest.json", labels=counts)
    assert made.command(clusters.main, "--outdir", outdir, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["labels"] for row in rows] == [
        {"news": 0.9, "m\x1bail": 0.1},
        {"m\x1bail": 0.5, "news": 0.5},
        {"": 1.0},
    ]
    assert made.command(clusters.main, "--outdir", outdir) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.index("labels") < header.index("what sets it apart")
    assert "news 90 %, m\\x1bail 10 %  butter flour" in lines[0].replace("   ", "  ")
    assert "(none) 100 %" in lines[2] and lines[2].endswith("rose soil")


def test_an_expert_that_is_missing_or_of_other_clusters_has_no_loss(outdir: Path, capsys) -> None:
    (outdir / "experts/0/card.json").unlink()
    card = outdir / "experts/1/card.json"
    change_json(card, made_from={"tokens": "others"})
    assert made.command(clusters.main, "--outdir", outdir, "--json") == 0
    assert [row["validation_loss"] for row in json.loads(capsys.readouterr().out)] == [None, None, 3.5]


def test_terms_cannot_write_on_the_terminal(tmp_path: Path, capsys) -> None:
    made.write(tmp_path / "results", terms=[["\x1b[2J"], ["b"]])
    assert made.command(clusters.main, "--outdir", tmp_path / "results") == 0
    assert "\\x1b[2J" in (printed := capsys.readouterr().out) and "\x1b" not in printed


def test_without_clusters_one_line_says_so(tmp_path: Path, capsys) -> None:
    assert made.command(clusters.main, "--outdir", tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}: no clusters yet. Expected ")


def test_the_outdir_is_that_of_the_config(outdir: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(outdir.parent)
    assert made.command(clusters.main) == 0, "results, if nothing says otherwise"
    outdir.rename(outdir.with_name("mine"))
    Path("mine.yaml").write_text("outdir: mine\n")
    assert made.command(clusters.main, "--configfile", "mine.yaml") == 0
    assert made.command(clusters.main) == 1
