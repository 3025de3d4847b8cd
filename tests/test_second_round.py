"""cluster.second_round: documents go to the experts that predict them best, as users meet it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from test_workflow import MERGE, jobs, kill_at, retrained

import made_corpus
from cbtm_pipeline import clusters, config, score_training, second_round, status
from cbtm_pipeline.base import artifact
from made_project import done, make_project, snakemake
from made_run import run_rule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("first-0", "first-1")


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a whole run that was killed in the first round; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("rounds") / "project"
    cluster = {"k": 2, "second_round": True, "n_init": 2}
    make_project(folder, cluster=cluster, train={"controls": [], "steps": 8, "first_share": 0.25})
    kill_at(folder, "work/first-1/state/step-*")
    (folder / "printed.txt").write_text(snakemake(folder, "--cores", "2"))
    return folder


def card(project: Path, name: str) -> dict:
    return artifact.read_sealed(project / f"results/experts/{name}/card.json", "expert")


def line(results: Path, config_file: Path, scores: list[Path], out: Path) -> list[str]:
    return [
        *("--config", str(config_file), "--shards", str(results / "shards/manifest.json")),
        *("--vectors", str(results / "embed/manifest.json"), "--out", str(out / "manifest.json")),
        *("--assignments", str(results / "assignments/manifest.json"), "--scores", *map(str, scores)),
        *("--tokenizer", str(results / "tokenizer/tokenizer.json")),
    ]


def test_experts_go_on_from_the_first_round_and_all_spend_what_dense_spends(rounds: Path) -> None:
    firsts, experts = [card(rounds, name) for name in NAMES], [card(rounds, name) for name in "01"]
    second = artifact.read_sealed(rounds / "results/second/manifest.json", "assignments")
    for j, (first, expert) in enumerate(zip(firsts, experts, strict=True)):
        assert first["made_from"]["seed"] == card(rounds, "seed")["identity"]
        assert expert["made_from"]["seed"] == first["identity"]
        assert expert["made_from"]["tokens"] == second["identity_groups"][j]
        assert (first["n_steps"], expert["n_steps"]) == (2, 6)
    tokens = sum(one["n_train_tokens"] for one in [*firsts, *experts])
    assert tokens == card(rounds, "dense")["n_train_tokens"]
    metrics = json.loads((rounds / "results/eval/metrics.json").read_text())
    flops = {row["system"]: row["train_flops"] for row in metrics["systems"]}
    assert flops["uniform"] == flops["dense"]
    read = [
        artifact.read_npz(rounds / f"results/second/scores/{name}.npz", "training_scores")[1]
        for name in NAMES
    ]
    assert metrics["flops"]["second_round"] == sum(one["flops"] for one in read) > 0
    assert "second round, scoring" in (rounds / "results/report.html").read_text()


def test_the_new_clusters_are_those_of_the_least_balanced_cost(rounds: Path, tmp_path: Path) -> None:
    results = rounds / "results"
    (tmp_path / "shards").symlink_to(results / "shards")
    shutil.copytree(results / "second", tmp_path / "second", ignore=shutil.ignore_patterns("scores"))
    manifest = made_corpus.check_grouping(tmp_path, "second")
    costs = [
        artifact.read_npz(results / f"second/scores/{name}.npz", "training_scores")[0]["nll_N"]
        for name in NAMES
    ]
    tables = [pq.read_table(results / f"second/{entry['name']}.parquet") for entry in manifest["shards"]]
    labels = np.concatenate([table["cluster"].to_numpy() for table in tables])
    n_tokens = np.concatenate([table["n_tokens"].to_numpy() for table in tables])
    nll_NK = np.stack(costs, axis=1)
    assert np.array_equal(labels, (nll_NK + manifest["fit_prices_K"]).argmin(axis=1))
    assert np.ptp(manifest["n_tokens"]) <= 2 * n_tokens.max()
    assert manifest["by"] == "second_round" and not any(manifest["prices_K"])
    arrays, record = artifact.read_npz(results / "second/clusterer.npz", "clusterer")
    x_ND = np.concatenate([np.load(results / f"embed/{entry['name']}.npy") for entry in manifest["shards"]])
    for j in range(2):
        mean = np.average(x_ND[labels == j], axis=0, weights=n_tokens[labels == j])
        np.testing.assert_allclose(arrays["centres_KD"][j], mean, atol=1e-5)
    routed = artifact.read_record(results / "route/distances.npz", "distances")["made_from"]
    assert routed["clusterer"] == record["seal"] == manifest["made_from"]["clusterer"]
    assert [row["n_tokens"] for row in clusters.read(results)] == manifest["n_tokens"]


def test_the_same_inputs_give_the_same_bytes(rounds: Path, tmp_path: Path) -> None:
    results = rounds / "results"
    scores = [results / f"second/scores/{name}.npz" for name in reversed(NAMES)]
    run_rule(second_round.main, line(results, results / "config.json", scores, tmp_path))
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert path.read_bytes() == (results / "second" / path.name).read_bytes(), path.name


def test_documents_beyond_the_sample_go_by_their_text(rounds: Path, tmp_path: Path) -> None:
    results = rounds / "results"
    content = config.read(results / "config.json").model_dump()
    content["cluster"]["fit_documents"] = 30
    config.write(config.validate(content), tmp_path / "config.json")
    scores = [tmp_path / f"{name}.npz" for name in NAMES]
    for name, path in zip(NAMES, scores, strict=True):
        run_rule(
            score_training.main,
            [
                *(
                    "--config",
                    str(tmp_path / "config.json"),
                    "--shards",
                    str(results / "shards/manifest.json"),
                ),
                *("--expert-weights", str(results / f"experts/{name}/model.safetensors"), "--out", str(path)),
            ],
        )
    run_rule(second_round.main, line(results, tmp_path / "config.json", scores, tmp_path / "second"))
    manifest = artifact.read_sealed(tmp_path / "second/manifest.json", "assignments")
    assert manifest["second_round"]["n_scored"] == 30 < sum(manifest["n_documents"])
    assert manifest["load_over_mean"]["tokens"]["max"] < 1.2


def test_a_score_of_another_cluster_is_refused(
    rounds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = rounds / "results"
    arrays, meta = artifact.read_npz(results / "second/scores/first-0.npz", "training_scores")
    artifact.write_npz(tmp_path / "first-0.npz", {**meta, "tokens": "0" * 32}, **arrays)
    scores = [tmp_path / "first-0.npz", results / "second/scores/first-1.npz"]
    with pytest.raises(SystemExit):
        run_rule(second_round.main, line(results, results / "config.json", scores, tmp_path / "out"))
    assert "first-0.npz: of an expert on other documents than its cluster" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run_rule(second_round.main, line(results, results / "config.json", scores[1:], tmp_path / "out"))
    assert "--scores: first-1. Expected first-0, first-1." in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_has_nothing_to_do_and_shows_its_rounds(rounds: Path) -> None:
    assert jobs(snakemake(rounds, "-n")) == set()
    printed = (rounds / "printed.txt").read_text()
    assert "train_expert first-1" in done(printed) and "train_expert seed" not in done(printed)
    rows = {row.name: row for row in status.gather(rounds / "results", {}, 0.0).rows}
    for name in (*NAMES, "score_training", "second_round"):
        assert rows[name].state == "done", name
    assert rows["score_expert"].n_steps == 4, "seed, two experts, dense"


def test_without_it_only_the_experts_and_what_reads_them_are_made_again(rounds: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(rounds, project, symlinks=True)
    (project / "one.yaml").write_text(yaml.safe_dump({"cluster": {"second_round": False}}))
    printed = snakemake(project, "-n", configfiles=["small.yaml", "one.yaml"])
    assert jobs(printed) == {"route"} | retrained({"0", "1"}) | MERGE
    assert "takes 2 trained models out of the run (first-0, first-1)" in printed


def test_held_out_text_has_no_say_in_the_second_round(rounds: Path) -> None:
    """So new held-out text trains nothing again."""
    results = rounds / "results"
    shards = artifact.read_sealed(results / "shards/manifest.json", "shards")
    for name in ("second/clusterer.npz", *(f"second/scores/{name}.npz" for name in NAMES)):
        kind = "clusterer" if name.endswith("clusterer.npz") else "training_scores"
        assert shards["identity_eval"] not in artifact.read_record(results / name, kind)["made_from"].values()
