"""Files that do not belong to one run are refused, in one line, and nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact
from made_run import QUICK, Files, change_json, change_npz, evaluate, make, make_config


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def refusal(files: Files, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error. Neither metrics.json nor table.txt may have been written."""
    with pytest.raises(SystemExit) as stop:
        evaluate(files)
    assert stop.value.code == 1
    assert not files.out.exists() and not files.out.with_name("table.txt").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 2}, **QUICK)
    assert evaluate(make(tmp_path / "two", cfg, n_documents=2))["n_documents"] == 1
    capsys.readouterr()
    assert "1 held-out document. Expected at least 2" in refusal(
        make(tmp_path / "one", cfg, n_documents=1), capsys
    )


def other_shards(run: Files) -> None:
    made_from = artifact.read_npz(run.scores["1"], "scores")[1]["made_from"]
    change_npz(run.scores["1"], "scores", meta={"made_from": {**made_from, "shards": "0" * 32}})


def other_k(run: Files) -> None:
    config.write(make_config(outdir="results", cluster={"k": 2}, **QUICK), run.config)
    for name in ("2", "random-2"):
        del run.scores[name], run.cards[name]


REFUSED = {
    "retrained": (
        lambda r: change_json(r.cards["2"], weights="f" * 32),
        "scores/2.npz: made from another expert",
    ),
    "other seed": (
        lambda r: change_json(r.cards["2"], made_from={"seed": "f" * 32}),
        "experts/2/card.json: made from another seed",
    ),
    "other shards": (other_shards, "scores/1.npz: made from another shards"),
    "other stride": (
        lambda r: change_npz(r.scores["0"], "scores", meta={"stride": 7}),
        "scores/0.npz: made with stride 7. Expected 128",
    ),
    "other cut": (
        lambda r: change_npz(r.scores["0"], "scores", meta={"max_document_tokens": 9}),
        "max_document_tokens 9. Expected 256",
    ),
    "distances of other cut": (
        lambda r: change_npz(r.distances, "distances", meta={"max_document_tokens": 9}),
        "distances.npz: made with max_document_tokens 9. Expected 256",
    ),
    "other clusters": (
        lambda r: change_json(
            r.cards["2"],
            made_from={**json.loads(r.cards["2"].read_text())["made_from"], "assignments": "a" * 32},
        ),
        "experts/2/card.json: made from another assignments",
    ),
    "no scores": (lambda r: r.scores.pop("1"), "scores/1.npz: not given."),
    "no card": (lambda r: r.cards.pop("random-0"), "experts/random-0/card.json: not given."),
    "twice": (lambda r: change_npz(r.scores["1"], "scores", meta={"expert": "0"}), "expert 0 again"),
    "unknown": (
        lambda r: change_npz(r.scores["1"], "scores", meta={"expert": "17"}),
        "scores/1.npz: expert 17. Expected one of seed, 0,",
    ),
    "fewer tokens": (
        lambda r: change_npz(r.scores["1"], "scores", logprob_N=np.zeros(3, np.float32)),
        "scores/1.npz: 3 tokens.",
    ),
    "not a number": (
        lambda r: change_npz(
            r.scores["1"],
            "scores",
            logprob_N=artifact.read_npz(r.scores["1"], "scores")[0]["logprob_N"] * np.float32(np.nan),
        ),
        "scores/1.npz: log-probabilities down to nan.",
    ),
    "other k": (other_k, "distances.npz: 3 clusters. Expected cluster.k, 2."),
    "card as scores": (
        lambda r: r.scores.update({"1": r.distances}),
        "distances.npz: distances. Expected scores.",
    ),
    "damaged": (
        lambda r: r.scores["1"].write_bytes(r.scores["1"].read_bytes()[:200]),
        "scores/1.npz: damaged",
    ),
    "gone": (lambda r: r.scores["1"].unlink(), "scores/1.npz: No such file or directory."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_in_one_line(
    case: str, run: Files, capsys: pytest.CaptureFixture[str]
):
    change, expected = REFUSED[case]
    change(run)
    line = refusal(run, capsys)
    assert expected in line
    assert line.count(". ") >= 2 and line.endswith((".", ".npz", ".json"))  # found, expected, what to do
