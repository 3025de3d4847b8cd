"""The rule from files to metrics.json and table.txt, on made-up runs."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cbtm_pipeline import config, eval_ensemble, plan
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.mixture import verdict
from made_run import LABELS, QUICK, Files, evaluate, make, make_config, make_report_inputs, render, run_rule
from resealed import change_json, change_npz


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


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
    stays = [row for row in rows(metrics, system="ensemble") if verdict.stays(row)]
    assert {(row["router"], row["top_k"]) for row in stays} == {("filter", 1), ("filter", 2)}
    assert all(row["calibrated"] and not row["headline"] for row in stays)
    metrics["systems"] = [row for row in metrics["systems"] if not verdict.stays(row)]
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
    for row in metrics["systems"]:
        n_active = row["n_active"]
        assert row["passes"] == n_active if row["system"] != "ensemble" else n_active <= row["passes"] <= 3
        hysteresis = 1 if row["router"] == "filter" else None
        assert (row["hysteresis"], row["fix_after"]) == (hysteresis, None)
    assert {frozenset(row) for row in metrics["systems"]} == {frozenset(metrics["systems"][0])}
    assert metrics["made_from"] == {
        "distances": artifact.read_record(run.distances, "distances")["seal"],
        **{
            f"scores-{name}": artifact.read_record(path, "scores")["seal"]
            for name, path in run.scores.items()
        },
    }
    assert metrics["made_with"] == plan.eval_ensemble(config.read(run.config)).content()
    assert metrics["files"] == ["table.txt", "documents.parquet"]
    assert metrics["table"] == artifact.identity(run.out.with_name("table.txt"))
    assert metrics["documents"] == artifact.identity(run.out.with_name("documents.parquet"))


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


def test_numbers_by_label_are_those_of_its_reported_documents(tmp_path: Path):
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 3}, corpus={"label_field": "source"}, **QUICK)
    run = make(tmp_path, cfg)
    metrics = evaluate(run)
    found = metrics["labels"]
    assert (found["field"], found["n_labels"], found["training"]["n_labels"]) == ("source", 2, 2)
    assert 0 <= found["held_out"]["nmi"] < 0.2 and found["training"]["nmi"] < 0.01
    distances, _ = artifact.read_npz(run.distances, "distances")
    reported = ~heldout.calibration_documents(distances["doc_id"], 0.3, 0)
    label_D = np.resize(np.array(LABELS, object), len(reported))
    assert [row["label"] for row in found["rows"]] == [
        "news",
        *sorted(LABELS[1:3], key=lambda name: -sum(label_D[reported] == name)),
    ]
    table = pq.read_table(run.out.with_name("documents.parquet")).to_pydict()
    assert table["label"] == label_D.tolist()
    best = verdict.headline(metrics)
    total = dict.fromkeys(("ensemble", "dense", "dense-steps"), 0.0)
    for row in found["rows"]:
        here = reported & (label_D == row["label"])
        n_tokens = np.array(table["n_tokens"])[here].sum()
        assert (row["n_documents"], row["n_tokens"]) == (here.sum(), n_tokens)
        for name in total:
            nll = np.array(table[f"nll_{name}"])[here].sum()
            total[name] += nll
            assert row["perplexity"][name] == pytest.approx(math.exp(nll / n_tokens))
        ratio = row["ratios"]["dense"]
        assert ratio["ratio"] == pytest.approx(row["perplexity"]["ensemble"] / row["perplexity"]["dense"])
        if here.sum() < heldout.MIN_REPORTED:
            assert ratio["ci95"] is None
        else:
            assert ratio["ci95"][0] <= ratio["ratio"] <= ratio["ci95"][1]
    assert any(row["n_documents"] < heldout.MIN_REPORTED for row in found["rows"])
    assert total["ensemble"] / metrics["n_tokens"] == pytest.approx(best["nll"])
    assert "labels" in metrics["made_from"]
    text = render(make_report_inputs(run))
    assert "&lt;b&gt;mail" in text and "<b>mail" not in text and "(none)" in text


def test_labels_change_no_other_number(tmp_path: Path):
    without, labelled = (
        evaluate(
            make(
                tmp_path / name,
                make_config(outdir=str(tmp_path / name), corpus={"label_field": field}, **QUICK),
            )
        )
        for name, field in (("a", None), ("b", "source"))
    )
    differ = {key for key in labelled if labelled[key] != without.get(key)}
    assert differ == {"labels", "made_from", "documents", "seal"}


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
    path = run.manifests["clusters"]
    groups = artifact.read_sealed(path, "assignments")["identity_groups"]
    change_json(path, identity_groups=[groups[old] for old in np.argsort(new)])
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


def test_the_documents_give_the_perplexities_of_the_systems(run: Files):
    metrics = evaluate(run)
    path = run.out.with_name("documents.parquet")
    with pq.ParquetFile(path) as file:
        found = file.read().to_pydict()
    distances = artifact.read_npz(run.distances, "distances")[0]
    assert found["doc_id"] == distances["doc_id"].tolist()
    assert found["cluster"] == distances["cluster"].tolist()
    reported = [used == "report" for used in found["used_for"]]
    assert sum(reported) == metrics["n_documents"]
    assert len(reported) - sum(reported) == metrics["calibration"]["n_documents"]

    def perplexity(column: str) -> float:
        pairs = zip(found[column], found["n_tokens"], reported, strict=True)
        nll, n = map(sum, zip(*((nll, n) for nll, n, is_reported in pairs if is_reported), strict=True))
        return math.exp(nll / n)

    for name in ("seed", "dense", "dense-steps"):
        (row,) = rows(metrics, system=name)
        assert perplexity(f"nll_{name}") == pytest.approx(row["perplexity"])
    best = min(rows(metrics, headline=True), key=lambda row: row["calibration_nll"])
    assert perplexity("nll_ensemble") == pytest.approx(best["perplexity"])
    before = path.read_bytes()
    evaluate(run)
    assert path.read_bytes() == before


def write_choices(folder: Path, cfg: config.Config, files: Files) -> list[str]:
    """Write the choices of a search between 0.1 and 0.2. The cards of the run are those of 0.1."""
    paths = []
    for kind, names in plan.searched(cfg).items():
        cards = {name: artifact.read_sealed(files.cards[name], "expert") for name in names}
        flops = sum(card["train_flops"] for card in cards.values())
        tried = [
            {"lr": 0.1, "validation_loss": 2.0, "train_flops": flops},
            {"lr": 0.2, "validation_loss": 3.0, "train_flops": 2 * flops},
        ]
        origin = {f"{name}@0.1": card["seal"] for name, card in cards.items()}
        meta = artifact.make_meta("choice", origin, {"rates": [0.1, 0.2]}, chosen=0.1, candidates=tried)
        artifact.write_sealed(folder / f"{kind}.json", meta)
        paths.append(str(folder / f"{kind}.json"))
    return paths


def test_the_search_and_a_larger_dense_model_are_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture):
    train = {"lr": [0.1, 0.2], "controls": ["dense-steps", "dense-large"]}
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 3}, train=train, **QUICK)
    files = make(tmp_path, cfg)
    paths = write_choices(tmp_path / "search", cfg, files)
    run_rule(eval_ensemble.main, [*files.arguments(), "--choices", *paths])
    metrics = json.loads(files.out.read_text())
    cards = {name: artifact.read_sealed(path, "expert") for name, path in files.cards.items()}
    own = {row["system"]: row for row in metrics["systems"]}
    assert own["dense-large"]["train_flops"] == cards["dense-large"]["train_flops"], "it needs no seed"
    assert own["dense"]["train_flops"] == cards["dense"]["train_flops"] + cards["seed"]["train_flops"]
    for row in metrics["systems"]:
        assert row["search_flops"] == pytest.approx(3 * row["train_flops"])
        assert set(row["ratios"]) == {"dense", "dense-steps", "dense-large"}
        assert all(ratio["ci95"] for ratio in row["ratios"].values())
        n_models = row["k"] if row["system"] in {"ensemble", "uniform", "oracle"} else 1
        assert row["n_parameters"] == 10**6 * n_models
        assert row["n_active_parameters"] == (None if row["n_active"] is None else 10**6 * row["n_active"])
    assert metrics["search"]["experts"]["chosen"] == 0.1 and len(metrics["search"]) == 5
    table = " ".join(files.out.with_name("table.txt").read_text().split())
    assert "of 0.1, 0.2: seed 0.1, experts 0.1, dense 0.1, dense-steps 0.1, dense-large 0.1." in table
    assert "is the smallest that was tried: smaller ones may be better. Add some to train.lr." in table
    assert "dense-large (twice the layers, from scratch" in table
    page = render([*make_report_inputs(files)])
    assert "Search for learning rates" in page and "dense-large, per token" in page
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_rule(eval_ensemble.main, files.arguments())
    assert "--choices: no seed.json. Expected that of each kind of model." in capsys.readouterr().err


def test_the_headline_compares_with_dense_large_where_that_is_the_strongest(tmp_path: Path):
    train = {"controls": ["dense-steps", "dense-large"]}
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 3}, train=train, **QUICK)
    files = make(tmp_path, cfg)
    logprob_N = artifact.read_npz(files.scores["dense-large"], "scores")[0]["logprob_N"]
    change_npz(
        files.scores["dense-large"], "scores", logprob_N=np.minimum(logprob_N + 2, 0).astype(np.float32)
    )
    metrics = evaluate(files)
    assert verdict.strongest_dense(metrics) == "dense-large"
    assert "against dense-large (twice the layers, from scratch" in metrics["verdict"][0]
