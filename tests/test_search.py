"""A run that searches learning rates, with a larger dense model, as its users meet it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline import adopt
from cbtm_pipeline.base import artifact
from cbtm_pipeline.provenance import kept
from made_project import done, make_project, snakemake
from made_run import run_rule

pytestmark = pytest.mark.slow

SEARCH = {"lr": [0.002, 0.02], "controls": ["dense-large"]}
KINDS = ["seed", "experts", "dense", "dense-large"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a whole run; tests must leave it as it is."""
    folder = make_project(tmp_path_factory.mktemp("searched") / "project", train=SEARCH)
    snakemake(folder, "--cores", "2")
    return folder


def planned(project: Path) -> list[str]:
    """The jobs of a dry run: rules, and of each its expert or kind."""
    printed = snakemake(project, "-n")
    found = re.findall(r"^(?:local)?rule (\w+):\n(?: .*\n)*?    wildcards: \w+=(\S+)", printed, re.M)
    assert found or "Nothing to be done" in printed
    return [f"{rule} {name}" for rule, name in found]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_each_kind_gets_the_rate_with_the_lowest_validation_loss(searched: Path) -> None:
    results = searched / "results"
    for kind in KINDS:
        names = ["0", "1"] if kind == "experts" else [kind]
        choice = read(results / f"search/{kind}.json")
        for row in choice["candidates"]:
            cards = [read(results / f"experts/{name}@{row['lr']}/card.json") for name in names]
            n_tokens = sum(card["n_validation_tokens"] for card in cards)
            mean = sum(card["n_validation_tokens"] * card["validation_loss"] for card in cards) / n_tokens
            assert row["validation_loss"] == pytest.approx(mean)
            assert row["train_flops"] == sum(card["train_flops"] for card in cards)
        losses = {row["lr"]: row["validation_loss"] for row in choice["candidates"]}
        assert choice["chosen"] == min(losses, key=lambda rate: losses[rate])
        for name in names:
            weights = results / f"experts/{name}/model.safetensors"
            assert weights.samefile(results / f"experts/{name}@{choice['chosen']}/model.safetensors")
    seed = read(results / "experts/seed/card.json")["identity"]
    branched = read(results / "experts/0@0.002/card.json")["made_from"]["seed"]
    assert branched == seed, "experts branch from the chosen seed"


def test_dense_large_costs_what_seed_and_experts_cost(searched: Path) -> None:
    metrics = read(searched / "results/eval/metrics.json")
    flops = {row["system"]: row["train_flops"] for row in metrics["systems"]}
    card = read(searched / "results/experts/dense-large/card.json")
    step = card["flops_per_token"] * card["made_with"]["batch_size"] * card["made_with"]["seq_len"]
    assert abs(flops["dense-large"] - flops["uniform"]) <= step
    assert set(metrics["search"]) == set(KINDS)
    assert "Search for learning rates" in (searched / "results/report.html").read_text()


def test_a_finished_search_has_nothing_to_do(searched: Path) -> None:
    assert planned(searched) == []


def test_a_longer_list_trains_the_new_rates_only(searched: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(searched, project, symlinks=True)
    (project / "longer.yaml").write_text("train: {lr: [0.002, 0.02, 1.0e-9]}")
    weights = project / "results/experts/0/model.safetensors"
    before = weights.read_bytes()
    target = "results/experts/0/model.safetensors"
    printed = snakemake(project, "--cores", "2", target, configfiles=["small.yaml", "longer.yaml"])
    trained = [job for job in done(printed) if job.startswith("train_expert")]
    logs = project / "results/logs/train_expert"
    new = {job for job in trained if "nothing to do" not in (logs / f"{job.split()[1]}.log").read_text()}
    assert new == {f"train_expert {name}@1e-09" for name in ("seed", "0", "1")}
    assert weights.read_bytes() == before


def test_without_keep_replaced_only_the_weights_of_other_rates_go(searched: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(searched, project, symlinks=True)
    results = project / "results"
    kept.tidy(results, keep_replaced=False)
    for kind in KINDS:
        choice = read(results / f"search/{kind}.json")
        for name in choice["made_from"]:
            is_chosen = name.endswith(f"@{choice['chosen']}")
            assert (results / f"experts/{name}/model.safetensors").exists() == is_chosen
            assert (results / f"experts/{name}/metrics.jsonl").exists()
    assert planned(project) == [], "nothing needs them"
    choice = artifact.read_sealed(results / "search/experts.json", "choice")
    other = next(row["lr"] for row in choice["candidates"] if row["lr"] != choice["chosen"])
    artifact.write_sealed(results / "search/experts.json", {**choice, "chosen": other})
    cards = [str(results / f"experts/0@{rate}/card.json") for rate in SEARCH["lr"]]
    line = ["--choice", str(results / "search/experts.json"), "--expert", "0", "--candidates", *cards]
    with pytest.raises(SystemExit):
        run_rule(adopt.main, [*line, "--out", str(results / "experts/0/model.safetensors")])
    assert f"train_expert 0@{other}" in planned(project), "as the line says"
