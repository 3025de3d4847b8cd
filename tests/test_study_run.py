"""A real study of two small runs: what they share is made once, and each run is what it is alone."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cbtm_pipeline.base import artifact
from made_project import make_project, snakemake
from parsed_page import Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STUDY = {
    "base": ["small.yaml", "few.yaml"],
    "outdir": "results/study",
    "grid": {"cluster.k": [1, 2], "train.steps": [4]},
}
SMALL = ("study.yaml",)
# files that tell when and how fast they were made, and those that name the run or its controls
OWN = re.compile(
    r"logs/|\.lock|\.corpus|config\.json$|ensemble/|eval/|report\.html|"
    r".*(files\.json|jsonl|tensorboard/.*|README\.md)$"
)


def run_study(project: Path, *args: str, study: dict | None = None) -> str:
    (project / "study.yaml").write_text(yaml.safe_dump(study or STUDY))
    return snakemake(project, "-s", "workflow/study.smk", *args, configfiles=SMALL)


def jobs(printed: str) -> tuple[Counter[str], Counter[str]]:
    """The jobs that made their outputs, and those that took them from another run, by rule and expert."""
    made, taken = Counter[str](), Counter[str]()
    for rule, expert, rest in re.findall(r"^\S+ I (\w+) \S+?=\S+(?: (\S+))? +done in (.*)$", printed, re.M):
        (taken if "taken from" in rest else made)[f"{rule} {expert}".strip()] += 1
    return made, taken


def runs_of(printed: str) -> set[str]:
    """The runs whose jobs a dry run lists."""
    runs = re.findall(r"wildcards: (?:expert=\S+, )?run=(\S+?)(?:,? ?expert=\S+)?$", printed, re.M)
    return {name.rstrip(",") for name in runs}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("study") / "project")
    (project / "few.yaml").write_text("train: {controls: []}\nroute: {fix_after: [], hysteresis: [1]}\n")
    (project / "printed.txt").write_text(run_study(project, "--cores", "2"))
    return project


def compare(project: Path, *args: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "cbtm_pipeline", "compare", *args]
    return subprocess.run(words, cwd=project, capture_output=True, text=True)


def test_what_runs_share_is_made_once(project: Path) -> None:
    made, taken = jobs((project / "printed.txt").read_text())
    for name in ("tokenizer", "shard", "embed"):
        assert (made[name], taken[name]) == (1, 1), name
    for name in ("fit_kmeans", "assign", "route"):
        assert (made[name], taken[name]) == (2, 0), name
    for name in ("seed", "dense"):
        assert (made[f"train_expert {name}"], taken[f"train_expert {name}"]) == (1, 1), name
        assert (made[f"score_expert {name}"], taken[f"score_expert {name}"]) == (1, 1), name
    assert made["train_expert 0"] == 2 and made["train_expert 1"] == 1 and made["eval_ensemble"] == 2


def test_each_run_has_the_files_that_it_would_have_alone(project: Path, finished: Path) -> None:
    run, alone = project / "results/study/runs/k=2,steps=4", finished / "results"
    names = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    compared = [name for name in names if not OWN.match(name)]
    assert len(compared) > 40 and "experts/1/model.safetensors" in compared
    for name in compared:
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    nlls = [
        {row["system"]: row["nll"] for row in artifact.read_json(folder / "eval/metrics.json")["systems"]}
        for folder in (run, alone)
    ]
    assert nlls[0].items() <= nlls[1].items()


def test_each_run_is_an_ordinary_one(project: Path) -> None:
    folder = "results/study/runs/k=2,steps=4"
    config = [f"{folder}/config.json"]
    assert "Nothing to be done" in snakemake(project, "-n", configfiles=config)
    words = [sys.executable, "-m", "cbtm_pipeline", "status", folder, "--json"]
    told = subprocess.run(words, cwd=project, capture_output=True, text=True, check=True).stdout
    assert '"failed"' not in told and '"waiting"' not in told


def test_status_of_a_study_has_a_row_for_each_run(project: Path) -> None:
    words = [sys.executable, "-m", "cbtm_pipeline", "status", "results/study"]
    told = subprocess.run(words, cwd=project, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^(k=\d)\S* +done +#{8} +(\d)/\2$", told, re.M) == [("k=1", "3"), ("k=2", "4")]
    assert told.startswith("results/study: no snakemake runs\n") and "\n2 runs: 2 done\n" in told
    told = subprocess.run([*words, "--json"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert [Path(run["outdir"]).name for run in json.loads(told)] == ["k=1,steps=4", "k=2,steps=4"]


def test_k_of_one_is_the_dense_model(project: Path) -> None:
    run = project / "results/study/runs/k=1,steps=4"
    one, dense = (run / f"experts/{name}/model.safetensors" for name in ("0", "dense"))
    assert one.read_bytes() == dense.read_bytes()
    systems = artifact.read_json(run / "eval/metrics.json")["systems"]
    same = {"dense", "ensemble", "uniform", "oracle", "expert-0"}
    assert len({row["nll"] for row in systems if row["system"] in same}) == 1


def test_the_study_ends_in_a_table_and_a_page_of_all_runs(project: Path) -> None:
    folder = project / "results/study"
    found = artifact.read_sealed(folder / "study.json", "study")
    names = ["k=1,steps=4", "k=2,steps=4"]
    assert [row["run"] for row in found["runs"]] == names and found["differs"] == ["cluster.k"]
    assert [row["n_tokens"] for row in found["runs"]] == [512, 512]
    assert found["runs"][0]["headline"]["ratio"] == 1, "the expert of k = 1 is the dense model"
    assert [row["n_tokens"] for row in found["best_k"]] == [512]
    assert (folder / "study.txt").read_text() in (project / "printed.txt").read_text()
    page = (folder / "study.html").read_text()
    Page(page)
    assert all(name in page for name in [*names, "training FLOPs"])
    assert "http" not in page and "<script" not in page
    rows = pq.read_table(folder / "study.parquet").to_pylist()
    assert {row["run"] for row in rows} == set(names) and {"seed", "dense"} < {row["model"] for row in rows}


def test_a_finished_study_has_nothing_to_do_and_a_larger_one_only_what_is_new(project: Path) -> None:
    assert "Nothing to be done" in run_study(project, "-n")
    larger = {**STUDY, "grid": {**STUDY["grid"], "cluster.k": [3, 1, 2]}}
    printed = run_study(project, "-n", study=larger)
    assert runs_of(printed) == {"k=3,steps=4"}


def test_one_run_of_a_study_is_asked_for_and_no_other_makes_anything(project: Path) -> None:
    larger = {**STUDY, "grid": {"cluster.k": [4, 3], "train.steps": [8, 4]}}
    printed = run_study(project, "-n", "results/study/runs/k=3,steps=8/eval/metrics.json", study=larger)
    assert runs_of(printed) == {"k=3,steps=8"}


def test_one_run_is_made_before_the_study_has_a_table(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy, symlinks=True)
    for path in (copy / "results/study").glob("study.*"):
        path.unlink()
    table = "results/study/runs/k=1,steps=4/eval/table.txt"
    (copy / table).unlink()
    printed = run_study(copy, "--cores", "2", table)
    assert (copy / table).exists() and "Error" not in printed and "Traceback" not in printed


def test_a_result_that_has_changed_makes_a_new_table(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy, symlinks=True)
    changed = {**STUDY, "grid": {**STUDY["grid"], "cluster.k": [1]}}
    printed = run_study(copy, "--cores", "2", study=changed)
    assert "study" in printed
    found = artifact.read_sealed(copy / "results/study/study.json", "study")
    assert [row["run"] for row in found["runs"]] == ["k=1,steps=4"]


def test_two_runs_side_by_side(project: Path) -> None:
    a, b = "results/study/runs/k=1,steps=4", "results/study/runs/k=2,steps=4"
    ran = compare(project, a, b, "--html", "page.html")
    assert ran.returncode == 0, ran.stderr
    assert "k=1,steps=4" in ran.stdout and "ratio per token" in ran.stdout
    assert "Run against run" in (project / "page.html").read_text()
    found = json.loads(compare(project, b, a, "--json").stdout)
    (pair,) = found["pairs"]
    assert (
        pair["n_documents"] == found["runs"][0]["n_documents"]
        and pair["ci95"][0] < pair["ratio"] < pair["ci95"][1]
    )


def test_a_run_on_other_held_out_text_is_refused_in_one_line(project: Path) -> None:
    change = "outdir: results/other\ncorpus: {eval_fraction: 0.45}\ncluster: {k: 1}\n"
    (project / "other.yaml").write_text(change)
    configs = ["small.yaml", "few.yaml", "other.yaml"]
    snakemake(project, "--cores", "2", "results/other/eval/metrics.json", configfiles=configs)
    ran = compare(project, "results/study/runs/k=1,steps=4", "results/other")
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and not ran.stdout
    assert "results/other: cannot be compared" in ran.stderr and "other held-out text" in ran.stderr


def test_a_run_that_is_not_finished_is_refused_in_one_line(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(project / "results/study/runs/k=1,steps=4", copy)
    (copy / "scores/0.npz").unlink()
    ran = compare(project, "results/study/runs/k=2,steps=4", str(copy))
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert f"{copy}: not finished (score_expert 0: not made yet)" in ran.stderr
    assert "no run" in compare(project, str(tmp_path)).stderr
