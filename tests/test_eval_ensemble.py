"""The rule from files to metrics.json and table.txt, on made-up runs; and what it refuses."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_pipeline import config, eval_ensemble
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.mixture import sweep, verdict
from made_run import Files, change_json, change_npz, make, make_config

QUICK = {
    "route": {"top_k": [1, 2, 9], "temperature": [0.1, 0.5], "epsilon": [0.01, 0.1], "beta": [1.0]},
    "eval": {"bootstrap": 200},
}


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def evaluate(files: Files, arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the module as the command line would, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_ensemble", *(arguments or files.arguments())])
        handlers = list(cli.log.handlers)
        try:
            cli.run(eval_ensemble.main)
        finally:
            cli.log.handlers[:] = handlers
    return json.loads(files.out.read_text())


def refusal(files: Files, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it ends with; nothing may have been written."""
    with pytest.raises(SystemExit) as stop:
        evaluate(files)
    assert stop.value.code == 1
    assert not files.out.exists() and not files.out.with_name("table.txt").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows(metrics: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [row for row in metrics["systems"] if all(row[key] == value for key, value in fields.items())]


def test_every_system_has_its_rows(run: Files):
    metrics = evaluate(run)
    names = [row["system"] for row in metrics["systems"] if row["system"] != "ensemble"]
    assert names == [
        "seed",
        "dense",
        "dense-steps",
        "random",
        "random",
        "uniform",
        "oracle",
        "expert-0",
        "expert-1",
        "expert-2",
    ]
    grid = [(row["router"], row["top_k"], row["temperature"]) for row in rows(metrics, system="ensemble")]
    assert grid == [(router, k, t) for router in ("paper", "filter") for k in (1, 2, 3) for t in (0.1, 0.5)]
    for router in ("paper", "filter"):
        assert [row["top_k"] for row in rows(metrics, router=router, calibrated=True)] == [1, 2, 3]
        (headline,) = rows(metrics, router=router, headline=True)
        assert headline["calibration_nll"] == min(
            row["calibration_nll"] for row in rows(metrics, router=router)
        )
        assert headline["calibrated"]
    assert all(row["epsilon"] is None for row in rows(metrics, router="paper"))
    assert all(row["epsilon"] in (0.01, 0.1) and row["beta"] == 1 for row in rows(metrics, router="filter"))
    assert {frozenset(row) for row in metrics["systems"]} == {frozenset(metrics["systems"][0])}
    assert metrics["kind"] == "metrics" and metrics["made_from"]["distances"] == artifact.identity(
        run.distances
    )
    assert metrics["made_from"]["scores-random-2"] == artifact.identity(run.scores["random-2"])


def test_numbers_are_those_of_the_reported_documents(run: Files):
    metrics = evaluate(run)
    distances, _ = artifact.read_npz(run.distances, "distances")
    reported = ~heldout.calibration_documents(distances["doc_id"], 0.3, 0)
    n_tokens, n_bytes = np.diff(distances["offsets"])[reported].sum(), distances["n_bytes"][reported].sum()
    assert [metrics[key] for key in ("n_documents", "n_tokens", "n_bytes")] == [28, n_tokens, n_bytes]
    assert metrics["calibration"]["n_documents"] == 12

    def nll(name: str, where: np.ndarray) -> float:
        logprob_N = artifact.read_npz(run.scores[name], "scores")[0]["logprob_N"].astype(float)
        return -sum(
            logprob_N[distances["offsets"][i] : distances["offsets"][i + 1]].sum()
            for i in np.flatnonzero(where)
        )

    for system, name in (("seed", "seed"), ("dense", "dense"), ("expert-1", "1")):
        (row,) = rows(metrics, system=system)
        assert row["nll"] == pytest.approx(nll(name, reported) / n_tokens)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["bits_per_byte"] == pytest.approx(nll(name, reported) / n_bytes / math.log(2))
        ratio = math.exp((nll(name, reported) - nll("dense", reported)) / n_tokens)
        assert row["ratio_to_dense"] == row["ratios"]["dense"]["ratio"] == pytest.approx(ratio)
        assert row["ci95"] == row["ratios"]["dense"]["ci95"]
        assert row["ci95"][0] <= row["ratio_to_dense"] <= row["ci95"][1]
        to_steps = math.exp((nll(name, reported) - nll("dense-steps", reported)) / n_tokens)
        assert row["ratios"]["dense-steps"]["ratio"] == pytest.approx(to_steps)
    assert rows(metrics, system="dense")[0]["ci95"] == [1, 1]
    assert rows(metrics, system="dense-steps")[0]["ratios"]["dense-steps"]["ci95"] == [1, 1]

    matrix = metrics["matrix"]
    for cluster in range(3):
        here = reported & (distances["cluster"] == cluster)
        n_here = np.diff(distances["offsets"])[here].sum()
        assert (matrix["n_documents"][cluster], matrix["n_tokens"][cluster]) == (here.sum(), n_here)
        assert matrix["perplexity"][2][cluster] == pytest.approx(math.exp(nll("2", here) / n_here))
        assert matrix["dense"][cluster] == pytest.approx(math.exp(nll("dense", here) / n_here))


def test_flops_are_apart_and_a_row_pays_for_all_that_it_needed(run: Files):
    metrics = evaluate(run)
    flops = metrics["flops"]
    assert set(flops) == {"seed", "experts", "dense", "dense-steps", "random", "forward_per_token"}
    assert flops["forward_per_token"] == pytest.approx(2e6)
    cost = {row["system"]: row["train_flops"] for row in metrics["systems"]}
    assert cost["seed"] == flops["seed"]
    assert cost["ensemble"] == cost["uniform"] == cost["oracle"] == flops["seed"] + flops["experts"]
    assert cost["dense"] == flops["seed"] + flops["dense"]
    assert cost["random"] == flops["seed"] + flops["random"]
    assert cost["expert-0"] == pytest.approx(flops["seed"] + flops["experts"] / 3)
    assert [row["n_active"] for row in rows(metrics, router="paper", temperature=0.1)] == [1, 2, 3]


def test_argument_order_and_repetition_change_no_byte(run: Files):
    evaluate(run)
    first = run.out.read_bytes(), run.out.with_name("table.txt").read_bytes()
    for table in (run.scores, run.cards):
        items = list(table.items())
        random.Random(1).shuffle(items)
        table.clear()
        table.update(items)
    evaluate(run)
    assert (run.out.read_bytes(), run.out.with_name("table.txt").read_bytes()) == first
    assert str(run.out.parent.parent) not in first[0].decode() + first[1].decode()


def test_renaming_the_clusters_renames_the_results(run: Files):
    before = evaluate(run)
    distances, _ = artifact.read_npz(run.distances, "distances")
    new = np.array([2, 0, 1])  # cluster i is now called new[i]
    change_npz(
        run.distances,
        "distances",
        d2_NK=distances["d2_NK"][:, np.argsort(new)],
        cluster=new[distances["cluster"]].astype(np.int32),
    )
    for old in range(3):
        change_npz(run.scores[str(old)], "scores", meta={"expert": str(new[old])})
        change_json(run.cards[str(old)], expert=str(new[old]))
    after = evaluate(run)
    for a, b in zip(rows(before, system="ensemble"), rows(after, system="ensemble"), strict=True):
        assert b["nll"] == pytest.approx(a["nll"], abs=1e-12)
        assert b["ci95"] == pytest.approx(a["ci95"], abs=1e-9)
    for old in range(3):
        assert (
            rows(after, system=f"expert-{new[old]}")[0]["nll"]
            == rows(before, system=f"expert-{old}")[0]["nll"]
        )
        assert (
            np.array(after["matrix"]["perplexity"])[new[old], new].tolist()
            == before["matrix"]["perplexity"][old]
        )
    assert after["systems"][:5] == before["systems"][:5]


def test_one_cluster_is_its_expert_exactly(tmp_path: Path):
    metrics = evaluate(make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 1}, **QUICK)))
    (expert,) = rows(metrics, system="expert-0")
    mixtures = [row for row in metrics["systems"] if row["system"] in ("ensemble", "uniform", "oracle")]
    assert len(mixtures) == 2 * 2 + 2
    for row in mixtures:
        assert (row["nll"], row["ratio_to_dense"], row["ci95"]) == (
            expert["nll"],
            expert["ratio_to_dense"],
            expert["ci95"],
        )
    assert metrics["matrix"]["perplexity"] == [[expert["perplexity"]]]


def test_identical_experts_are_one_expert(run: Files):
    for name in ("1", "2"):
        change_npz(
            run.scores[name], "scores", logprob_N=artifact.read_npz(run.scores["0"], "scores")[0]["logprob_N"]
        )
    metrics = evaluate(run)
    for row in metrics["systems"]:
        if row["system"] in ("ensemble", "uniform", "oracle"):
            assert row["nll"] == pytest.approx(rows(metrics, system="expert-0")[0]["nll"], abs=1e-12)


def test_without_controls_there_are_no_rows_for_them(tmp_path: Path):
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 2}, train={"controls": []}, **QUICK)
    metrics = evaluate(make(tmp_path, cfg))
    assert {row["system"] for row in metrics["systems"]} == {
        "seed",
        "dense",
        "uniform",
        "ensemble",
        "oracle",
        "expert-0",
        "expert-1",
    }
    assert set(metrics["systems"][0]["ratios"]) == {"dense"}
    assert set(metrics["flops"]) == {"seed", "experts", "dense", "forward_per_token"}


def test_an_empty_cluster_has_no_perplexity(run: Files):
    distances, _ = artifact.read_npz(run.distances, "distances")
    change_npz(
        run.distances, "distances", cluster=np.where(distances["cluster"] == 1, 0, distances["cluster"])
    )
    matrix = evaluate(run)["matrix"]
    assert [line[1] for line in [*matrix["perplexity"], matrix["dense"]]] == [None] * 4
    assert matrix["n_tokens"][1] == 0


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 2}, **QUICK)
    assert evaluate(make(tmp_path / "two", cfg, n_documents=2))["n_documents"] == 1
    capsys.readouterr()
    assert "1 held-out document. Expected at least 2" in refusal(
        make(tmp_path / "one", cfg, n_documents=1), capsys
    )


def test_table_fits_a_terminal_and_says_all(run: Files, capsys: pytest.CaptureFixture[str]):
    metrics = evaluate(run)
    text = run.out.with_name("table.txt").read_text()
    assert capsys.readouterr().out == text
    assert max(map(len, text.splitlines())) <= 100
    shown = verdict.main_rows(metrics)
    assert len(shown) == 3 + 2 + 1 + 6 + 1
    for row, line in zip(shown, text.splitlines()[2:], strict=False):
        assert line.startswith(verdict.label(row))
        assert (
            f"{row['perplexity']:.2f}" in line
            and verdict.interval(row["ratio_to_dense"], row["ci95"]) in line
        )
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
    assert max(map(len, text.splitlines())) <= 100


def test_verdict_says_who_wins(run: Files):
    def worse(nats: float, *names: str) -> None:
        for name in names:
            logprob_N = artifact.read_npz(run.scores[name], "scores")[0]["logprob_N"]
            change_npz(run.scores[name], "scores", logprob_N=logprob_N - np.float32(nats))

    worse(2.0, "dense", "dense-steps")
    assert [s.split(", ")[-1] for s in evaluate(run)["verdict"][:2]] == ["the ensemble wins."] * 2
    worse(3.0, "0", "1", "2")
    said = evaluate(run)["verdict"]
    assert (
        said[0].endswith("dense wins.") and "against dense (k x batch, 1.00 x the training FLOPs)" in said[0]
    )
    assert said[1].endswith("dense-steps wins.") and "against dense-steps (k x steps" in said[1]
    assert said[-1].startswith("random, posterior against dense: ") and said[-1].endswith(
        "a gain without clusters."
    )
    for name in (*"012", "random-0", "random-1", "random-2"):
        change_npz(
            run.scores[name],
            "scores",
            logprob_N=artifact.read_npz(run.scores["dense"], "scores")[0]["logprob_N"],
        )
    said = evaluate(run)["verdict"]
    assert said[0].endswith("no clear difference.") and said[-1].endswith("no clear difference.")


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
