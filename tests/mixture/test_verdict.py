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
        outdir=str(tmp_path),
        cluster={"k": 40},
        route=route,
        eval={"bootstrap": 100},
        train={"dense": "steps"},
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
    assert "against dense-steps (k x steps, 1.00 x the training FLOPs)" in texts[0]
    assert texts[0].endswith("dense-steps wins.")
    assert texts[1].endswith("dense wins.") and "against dense (k x batch" in texts[1]
    assert texts[-1].startswith("random, posterior against dense-steps: ")
    assert texts[-1].endswith("a gain without clusters.")
    for name in (*"012", "random-0", "random-1", "random-2"):
        change_npz(
            run.scores[name],
            "scores",
            logprob_N=artifact.read_npz(run.scores["dense-steps"], "scores")[0]["logprob_N"],
        )
    texts = evaluate(run)["verdict"]
    assert texts[0].endswith("no clear difference.") and texts[-1].endswith("no clear difference.")


def test_the_headline_is_against_the_strongest_dense_model_of_equal_compute(run: Files, caplog):
    """dense-steps beats the ensemble here, and dense does not: the ensemble must not be said to win."""
    logprob_N = artifact.read_npz(run.scores["dense-steps"], "scores")[0]["logprob_N"]
    change_npz(run.scores["dense-steps"], "scores", logprob_N=logprob_N + np.float32(0.5))
    metrics = evaluate(run)
    best = verdict.headline(metrics)
    assert best["ratios"]["dense"]["ci95"][1] < 1 < best["ratios"]["dense-steps"]["ci95"][0]
    assert verdict.strongest_dense(metrics) == "dense-steps"
    assert verdict.outcome(metrics) == "Dense-steps wins."
    assert metrics["verdict"][0].endswith("dense-steps wins.")
    assert metrics["verdict"][0] in caplog.messages, "what the terminal shows of the job"
    by_name = {row["system"]: row for row in metrics["systems"]}
    by_name["dense-steps"]["train_flops"] *= 2
    assert verdict.strongest_dense(metrics) == "dense" and verdict.outcome(metrics) == "The ensemble wins."
    by_name["dense"]["train_flops"] *= 2
    assert verdict.strongest_dense(metrics) == "dense-steps", "all have more compute"


def test_a_setting_at_the_end_of_its_list_is_named():
    row = {"router": "filter", "top_k": 2, "k": 8, "temperature": 0.1, "epsilon": 0.3, "beta": 1.0}
    tried = {"temperature": [0.1, 1.0], "epsilon": [0.1, 0.3, 0.9], "beta": [1.0], "top_k": [1, 2]}
    temperature, top_k = verdict.at_the_ends(row, tried)
    assert temperature == (
        "temperature 0.1 is the smallest value that was tried: smaller ones may be better. "
        "Add some to route.temperature."
    )
    assert top_k.startswith("top_k 2 is the largest that was tried, of 8 experts.")
    assert verdict.at_the_ends({**row, "top_k": 8}, {**tried, "temperature": [0.01, 0.1, 1.0]}) == []
    ends = {**tried, "temperature": [0.1], "beta": [0.5, 1.0]}
    assert len(verdict.at_the_ends({**row, "top_k": 1}, {**ends, "top_k": [1, 8]})) == 0, "beta is idle alone"
    assert "route.beta" in verdict.at_the_ends({**row, "top_k": 8}, ends)[0]
