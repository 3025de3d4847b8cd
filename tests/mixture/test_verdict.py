"""The table for the terminal and the sentences of the verdict, on made-up runs."""

from pathlib import Path

import numpy as np
import pytest

from cbtm_pipeline.base import artifact
from cbtm_pipeline.mixture import verdict
from made_run import QUICK, Files, evaluate, make, make_config
from resealed import change_npz


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def test_table_fits_a_terminal_and_says_all(run: Files, capsys: pytest.CaptureFixture[str]):
    metrics = evaluate(run)
    text = run.out.with_name("table.txt").read_text()
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= verdict.WIDTH
    shown = verdict.main_rows(metrics)
    names = [verdict.label(row) for row in shown]
    assert {"filter top-1 fixed", "filter top-2 fixed"} <= set(names)
    n_sticky = sum(name.endswith("sticky") for name in names)
    assert len(shown) == 3 + 2 + 1 + 6 + 2 + n_sticky + 1
    for row, line in zip(shown, text.splitlines()[2:], strict=False):
        assert line.startswith(verdict.label(row))
        assert (
            f"{row['perplexity']:.2f}" in line
            and verdict.interval(row["ratio_to_dense"], row["ci95"]) in line
        )
        assert verdict.short(row["passes"]) in line.split(f"{row['perplexity']:.2f}")[0]
        assert ("*" in line) == row["headline"]
    assert " ".join(metrics["verdict"]) in " ".join(text.split())


def test_table_fits_with_the_widest_numbers(tmp_path: Path):
    route = {**QUICK["route"], "temperature": [0.000123456], "epsilon": [0.000123456], "beta": [0.123456]}
    cfg = make_config(
        outdir=str(tmp_path), cluster={"k": 40}, route=route, eval={"bootstrap": 10}, train={"dense": "steps"}
    )
    files = make(tmp_path, cfg)
    evaluate(files)
    text = files.out.with_name("table.txt").read_text()
    assert "filter all-40" not in text and "filter top-9" in text
    assert max(map(len, text.splitlines())) <= verdict.WIDTH


def test_verdict_says_who_wins(run: Files):
    def worse(nats: float, *names: str) -> None:
        for name in names:
            logprob_N = artifact.read_npz(run.scores[name], "scores")[0]["logprob_N"]
            change_npz(run.scores[name], "scores", logprob_N=logprob_N - np.float32(nats))

    worse(2.0, "dense", "dense-steps")
    assert [s.split(", ")[-1] for s in evaluate(run)["verdict"][:2]] == ["the ensemble wins."] * 2
    worse(3.0, "0", "1", "2")
    texts = evaluate(run)["verdict"]
    assert "against dense (k x batch, 1.00 x the training FLOPs)" in texts[0]
    assert texts[0].endswith("dense wins.")
    assert texts[1].endswith("dense-steps wins.") and "against dense-steps (k x steps" in texts[1]
    assert texts[-1].startswith("random, posterior against dense: ")
    assert texts[-1].endswith("a gain without clusters.")
    for name in (*"012", "random-0", "random-1", "random-2"):
        change_npz(
            run.scores[name],
            "scores",
            logprob_N=artifact.read_npz(run.scores["dense"], "scores")[0]["logprob_N"],
        )
    texts = evaluate(run)["verdict"]
    assert texts[0].endswith("no clear difference.") and texts[-1].endswith("no clear difference.")
