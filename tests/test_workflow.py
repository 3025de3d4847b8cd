"""The workflow as its users meet it: a whole run, the three gestures, and what a change costs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

import made_encoder
from cbtm_pipeline import plan
from cbtm_pipeline.base import artifact
from made_project import ROOT, done, make_project, snakemake, snakemake_command

pytestmark = pytest.mark.slow

MERGE = {"eval_ensemble", "report", "ensemble"}
EXPERTS = {"0", "1", "dense", "dense-steps", "random-0", "random-1"}


def jobs(printed: str) -> set[str]:
    """The jobs of a dry run: rule names, for experts `rule expert`."""
    found = set()
    for rule, block in re.findall(r"^(?:local)?rule (\w+):\n((?: .*\n)*)", printed, re.M):
        expert = re.search(r"wildcards: expert=(\S+)", block)
        found.add(f"{rule} {expert[1]}" if expert else rule)
    return found - {"all"}


def each(rule: str, experts: set[str]) -> set[str]:
    return {f"{rule} {expert}" for expert in experts}


def retrained(experts: set[str]) -> set[str]:
    return each("train_expert", experts) | each("score_expert", experts)


CLUSTERING = {"fit_kmeans", "assign", "route"} | retrained({"0", "1"}) | MERGE
TASKS = each("eval_task", {"seed", "dense", "dense-steps", "0", "1", "ensemble", "ensemble-top1"})
TRAINING = retrained(EXPERTS | {"seed"}) | MERGE
CORPUS = {"tokenizer", "shard", "embed", "assign_random"} | CLUSTERING | TRAINING

CHANGES = {
    "route: {top_k: 1}": MERGE,
    "route: {temperature: [0.3]}": MERGE,
    "route: {routers: [paper]}": MERGE,
    "route: {hysteresis: [1, 3]}": MERGE,
    "route: {fix_after: []}": MERGE,
    "eval: {bootstrap: 100}": MERGE,
    "eval: {max_document_tokens: 20}": {"route"} | each("score_expert", EXPERTS | {"seed"}) | MERGE,
    "eval: {tasks: [lambada_openai]}": TASKS | {"tasks_table", "report"},
    "eval: {tasks: []}": set(),
    "eval: {stride: 8}": each("score_expert", EXPERTS | {"seed"}) | MERGE,
    "cluster: {k: 3}": {"fit_kmeans", "assign", "assign_random", "route"}
    | retrained({"0", "1", "2", "random-0", "random-1", "random-2", "dense-steps"})
    | MERGE,
    "cluster: {balance: documents}": CLUSTERING,
    "cluster: {border_share: 0.1}": {"assign"} | retrained({"0", "1"}) | MERGE,
    "cluster: {parents: 1}": CLUSTERING | {"train_expert parent-0"},
    "cluster: {second_round: true}": {"route", "second_round"}
    | each("train_expert", {"first-0", "first-1"})
    | each("score_training", {"first-0", "first-1"})
    | retrained({"0", "1"})
    | MERGE,
    "train: {first_share: 0.3}": set(),
    "{corpus: {label_field: domain}, cluster: {by: label}}": CORPUS - {"tokenizer"},
    "embed: {idf_power: 1.0}": {"embed"} | CLUSTERING,
    "embed: {encoder: me/encoder}": ({"embed"} | CLUSTERING) - {"ensemble"},
    "embed: {windows: 2}": set(),
    "route: {window_tokens: 8}": set(),
    "train: {lr: 0.001}": TRAINING,
    "train: {lr: [0.001, 0.002]}": each(
        "train_expert", {f"{name}@{rate}" for name in EXPERTS | {"seed"} for rate in (0.001, 0.002)}
    )
    | each("adopt", EXPERTS | {"seed"})
    | each("score_expert", EXPERTS | {"seed"})
    | {"choose"}
    | MERGE,
    "train: {controls: [dense-steps, random, dense-large]}": retrained({"dense-large"}) | MERGE,
    "train: {steps: 5}": TRAINING,
    "train: {dense: steps}": retrained({"dense"}) | MERGE,
    "train: {controls: [dense-steps]}": MERGE,
    "model: {scratch: {hidden_size: 16}}": TRAINING,
    "corpus: {eval_fraction: 0.2}": CORPUS,
    "corpus: {label_field: domain}": CORPUS - {"tokenizer"},
    "corpus: {max_bad_share: 0.5}": CORPUS - {"tokenizer"},
    "tokenizer: {vocab_size: 310}": CORPUS,
    "seed: 1": CORPUS - {"tokenizer", "shard"},
    "run: {log_seconds: 1.0}": set(),
    "tags: {licence: cc-by}": {"ensemble"},
}


def test_whole_run(finished: Path) -> None:
    results = finished / "results"
    metrics = json.loads((results / "eval/metrics.json").read_text())
    systems = {row["system"] for row in metrics["systems"]}
    assert systems >= {
        "seed",
        "dense",
        "dense-steps",
        "expert-0",
        "expert-1",
        "ensemble",
        "uniform",
        "random",
        "oracle",
    }
    assert metrics["n_documents"] > 0 and metrics["n_tokens"] > 0 and metrics["n_bytes"] > 0
    assert "<svg" in (results / "report.html").read_text()
    assert not list(results.rglob("*.tmp"))
    assert not list((results / "work").glob("*/state*")), "a finished expert leaves no resumable state"


def test_finished_run_has_nothing_to_do(finished: Path) -> None:
    assert jobs(snakemake(finished, "-n")) == set()


# Each starts Snakemake. test_own_record asks the records alone, which decide, about all changes.
@pytest.mark.parametrize("change", list(CHANGES)[::4])
def test_change_reruns_what_depends_on_it_and_nothing_else(
    finished: Path, change: str, tmp_path: Path
) -> None:
    (tmp_path / "change.yaml").write_text(yaml.safe_dump(yaml.safe_load(change)))
    printed = snakemake(finished, "-n", configfiles=["small.yaml", str(tmp_path / "change.yaml")])
    assert jobs(printed) == CHANGES[change]


def test_an_encoder_instead_of_the_linear_embedder(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    made_encoder.write(project / "encoder")
    (project / "encoder.yaml").write_text("embed: {encoder: encoder}\nroute: {window_tokens: 8}\n")
    distances = "results/route/distances.npz"
    printed = snakemake(project, "--cores", "2", distances, configfiles=["small.yaml", "encoder.yaml"])
    assert done(printed) == ["embed", "fit_kmeans", "route"]
    before, after = (artifact.read_npz(folder / distances, "distances")[0] for folder in (finished, project))
    assert {name: array.shape for name, array in before.items()} == {
        name: array.shape for name, array in after.items()
    }
    assert np.array_equal(before["offsets"], after["offsets"]) and np.array_equal(
        before["doc_id"], after["doc_id"]
    )
    rows = np.flatnonzero((np.diff(after["d2_NK"], axis=0) != 0).any(axis=1)) + 1
    starts = after["offsets"][np.searchsorted(after["offsets"], rows, side="right") - 1]
    assert {0} < set(rows - starts) <= set(range(0, 1000, 8)), (
        "weights change where documents and windows begin"
    )


def test_new_data_reruns_everything(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    with (project / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "text": "a new document about butter"}) + "\n")
    assert jobs(snakemake(project, "-n")) == CORPUS


def test_forcing_one_expert_trains_it_again_and_rescores_what_depends_on_it(
    finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    weights = project / "results/experts/1/model.safetensors"
    before, metrics = weights.read_bytes(), (project / "results/eval/metrics.json").read_bytes()
    weights.write_bytes(b"spoilt")
    printed = snakemake(project, "--cores", "2", "--force", "results/experts/1/model.safetensors")
    assert done(printed) == ["train_expert 1"]
    assert weights.read_bytes() == before, "training is a function of config and data"
    snakemake(project, "--cores", "2")
    assert (project / "results/eval/metrics.json").read_bytes() == metrics


def test_an_expert_trained_again_is_scored_again_and_nothing_else(finished: Path) -> None:
    printed = snakemake(finished, "-n", "--forcerun", "results/experts/1/model.safetensors")
    assert jobs(printed) == {"train_expert 1", "score_expert 1"} | MERGE


def graph_edges(text: str) -> set[tuple[str, str]]:
    """Edges of a graph in dot (as Snakemake prints it) or Mermaid (as the README shows it)."""
    label = dict(re.findall(r'(\d+)\[label = "(\w+)"', text))
    return {(label.get(a, a), label.get(b, b)) for a, b in re.findall(r"(\w+) --?> (\w+)", text)}


def test_rule_graph_in_the_readme_is_true() -> None:
    printed = subprocess.run(
        snakemake_command("--rulegraph", configfiles=["config.yaml"]),
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    diagram = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert diagram
    true = {edge for edge in graph_edges(printed) if "all" not in edge}
    assert len(true) > 10
    assert graph_edges(diagram[1]) == true


def test_dag_shows_every_expert(finished: Path) -> None:
    printed = snakemake(finished, "--dag", "--forceall")
    assert printed.count('label = "train_expert') == 1 + len(EXPERTS)
    assert all(f"expert: {expert}" in printed for expert in EXPERTS)


# A run is killed when it has published such a file. In every order of jobs, each point comes after the one
# before it.
KILL_POINTS = [
    "shards/*.arrow",
    "work/seed/state/step-*",
    "experts/1/config.json",
    "scores/1.npz",
    "eval/table.txt",
]

# Python imports a module of this name at every start: here, each job kills the whole run at its kill point.
KILL = """
import fnmatch, os, pathlib, signal

replace = pathlib.Path.replace


def replace_and_kill(self, target):
    replace(self, target)
    if fnmatch.fnmatch(os.path.abspath(target), "*/results/" + os.environ["KILL_POINT"]):
        os.killpg(0, signal.SIGKILL)


pathlib.Path.replace = replace_and_kill
"""


def kill_at(project: Path, point: str, configfiles: Sequence[str] = ("small.yaml",)) -> None:
    """Start a run and kill it, with all its jobs, as soon as it has published the file `point`."""
    (project / "killed").mkdir(exist_ok=True)
    (project / "killed/sitecustomize.py").write_text(KILL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project / "killed")}
    run = subprocess.run(
        snakemake_command("--cores", "2", configfiles=configfiles),
        cwd=project,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**environment, "KILL_POINT": point},
    )
    assert run.returncode == -signal.SIGKILL, f"not killed at {point}"


def test_killed_at_many_points_and_started_again_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project")
    for point in KILL_POINTS:
        kill_at(project, point)
    snakemake(project, "--cores", "2")
    for name in ["eval/metrics.json", "eval/table.txt"]:
        assert (project / "results" / name).read_bytes() == (finished / "results" / name).read_bytes(), name


def test_a_second_run_in_the_same_folder_is_refused(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    hold = "from cbtm_pipeline.base import lock; lock.hold('results'); print('held', flush=True); input()"
    weights = "results/experts/1/model.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        before = (project / weights).read_bytes()
        assert f"process {first.pid} " in snakemake(project, "--cores", "1", "--force", weights, ok=False)
        assert (project / weights).read_bytes() == before, "a refused run touches nothing"
        first.kill()
    snakemake(project, "--cores", "1", "--force", weights)


def test_experts_of_the_default_config() -> None:
    from cbtm_pipeline import config

    c = config.read(ROOT / "config.yaml")
    assert set(plan.experts(c)) >= {"0", "dense", "random-0"}
