"""The whole workflow and its gestures with --profile slurm, on the box."""

import shutil
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from cbtm_pipeline.slurm import events
from made_project import done, make_project, snakemake_command

from .box import Box
from .machine import wait
from .runs import Run, write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXPERTS = ("0", "1")


def snakemake(box: Box, project: Path, *args: str, ok: bool = True) -> str:
    command = snakemake_command(*args, "--profile", "slurm")
    run = subprocess.run(
        command,
        cwd=project,
        env={**box.env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (run.returncode == 0) == ok, run.stdout
    return run.stdout


def jobs(box: Box, project: Path) -> dict[str, dict[str, str]]:
    """Accounting rows, by name, of every job that was submitted from a project."""
    ids = [
        row["job_id"]
        for path in project.glob("results/slurm/*/")
        for row in events.read(path)
        if row["event"] == "submitted"
    ]
    rows: list[dict[str, str]] = []

    def ended() -> bool:
        rows[:] = box.sacct(f"--jobs={','.join(ids)}")
        # Accounting calls a job "allocation" until the record of its start has arrived. That of its end may
        # be there before.
        known = (row["End"] not in ("Unknown", "None") and row["JobName"] != "allocation" for row in rows)
        return len(rows) == len(ids) and all(known)

    wait(ended, 30, "accounting of all jobs")
    return {row["JobName"]: row for row in rows}


@pytest.fixture(scope="module")
def on_slurm(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("slurm") / "project")
    write_profile(project)
    (project / "printed.txt").write_text(snakemake(box, project))
    return project


def test_the_result_is_that_of_a_run_without_slurm(on_slurm: Path, finished: Path) -> None:
    for name in [
        "eval/metrics.json",
        "eval/table.txt",
        *(f"experts/{expert}/model.safetensors" for expert in EXPERTS),
    ]:
        assert (on_slurm / "results" / name).read_bytes() == (finished / "results" / name).read_bytes(), name


def test_the_terminal_has_few_lines_for_each_job(on_slurm: Path) -> None:
    printed = (on_slurm / "printed.txt").read_text()
    n_jobs = len(list(on_slurm.glob("results/slurm/*/events.jsonl")))
    assert len(done(printed)) == len(set(done(printed))) == n_jobs
    assert printed.count(" submitted\n") == n_jobs
    assert "started\n" not in printed and "rule train_expert:" not in printed
    n_table = len((on_slurm / "results/eval/table.txt").read_text().splitlines())
    assert len(printed.splitlines()) <= 4 * n_jobs + n_table + 10


def test_every_rule_was_a_job_and_the_experts_ran_at_the_same_time(box: Box, on_slurm: Path) -> None:
    rows = jobs(box, on_slurm)
    experts = [*EXPERTS, "dense", "dense-steps", "random-0", "random-1", "seed"]
    corpus = [
        "tokenizer",
        "shard",
        "embed",
        "fit_kmeans",
        "assign",
        "assign_random",
        "route",
        "eval_ensemble",
        "report",
        "ensemble",
    ]
    assert set(rows) == {*corpus, *(f"{kind}-{expert}" for kind in ("expert", "score") for expert in experts)}
    assert {row["State"] for row in rows.values()} == {"COMPLETED"}
    a, b = (rows[f"expert-{expert}"] for expert in EXPERTS)
    assert max(a["Start"], b["Start"]) < min(a["End"], b["End"]), "ISO times compare as text"


def test_every_expert_had_one_gpu_to_itself(box: Box, on_slurm: Path) -> None:
    rows = jobs(box, on_slurm)
    seen = {}
    for expert in [*EXPERTS, "dense", "dense-steps", "random-0", "random-1", "seed"]:
        (started,) = [
            row
            for row in events.read(on_slurm / f"results/slurm/expert-{expert}")
            if row["event"] == "started"
        ]
        assert started["gpus"] in ("0", "1")
        job = rows[f"expert-{expert}"]
        seen[expert] = (started["node"], started["gpus"], job["Start"], job["End"])
    for a, b in combinations(seen.values(), 2):
        assert a[:2] != b[:2] or a[3] <= b[2] or b[3] <= a[2], f"{a} and {b} share a GPU"


def test_experts_need_no_network(on_slurm: Path, tmp_path: Path) -> None:
    """In a network namespace without any interface, an expert gets the same weights."""
    results = on_slurm / "results"
    command = [
        sys.executable,
        "-m",
        "cbtm_pipeline.train_expert",
        "--config",
        results / "config.json",
        "--expert",
        "0",
    ]
    command += [
        "--data",
        results / "assignments/manifest.json",
        "--tokenizer",
        results / "tokenizer/tokenizer.json",
    ]
    command += ["--seed-model", results / "experts/seed/model.safetensors"]
    command += ["--out", tmp_path / "0/model.safetensors", "--work", tmp_path / "work"]
    subprocess.run(["unshare", "--map-root-user", "--net", *map(str, command)], cwd=on_slurm, check=True)
    assert (tmp_path / "0/model.safetensors").read_bytes() == (
        results / "experts/0/model.safetensors"
    ).read_bytes()


def test_forcing_one_expert_submits_one_training_job(box: Box, on_slurm: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(on_slurm, project, symlinks=True)
    before = {path: path.stat().st_size for path in project.glob("results/slurm/*/events.jsonl")}
    weights = project / "results/experts/1/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"spoilt")
    snakemake(box, project, "--force", "results/experts/1/model.safetensors")
    assert weights.read_bytes() == content
    changed = {path.parent.name for path, size in before.items() if path.stat().st_size != size}
    assert changed == {"expert-1"}
    assert (
        len([row for row in events.read(project / "results/slurm/expert-1") if row["event"] == "submitted"])
        == 2
    )


def test_the_profile_reruns_nothing(box: Box, on_slurm: Path) -> None:
    assert "Nothing to be done" in snakemake(box, on_slurm, "-n")
    without = subprocess.run(
        snakemake_command("-n", "--cores", "2"), cwd=on_slurm, capture_output=True, text=True
    )
    assert "Nothing to be done" in without.stdout + without.stderr
    content = yaml.safe_load((on_slurm / "slurm/config.yaml").read_text())
    content["default-resources"]["runtime"] = 7
    content["set-resources"]["train_expert"]["mem_mb"] = 1234
    (on_slurm / "slurm/config.yaml").write_text(yaml.safe_dump(content))
    assert "Nothing to be done" in snakemake(box, on_slurm, "-n")


def test_scancel_of_one_expert_fails_that_expert_only(box: Box, prepared: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    first = Run.of_copy(box, prepared, project, "0")
    second = Run(box, project, "1")
    both = ["results/experts/0/model.safetensors", "results/experts/1/model.safetensors"]
    first.start(both[1])
    first.reach(20)
    box.run("scancel", first.job_id)
    first.finish(ok=False)
    assert "cancelled by somebody" in first.printed()
    assert second.weights.exists() and not first.weights.exists()
    snakemake(box, project, *both)
    assert first.weights.exists()
    assert len(second.events("submitted")) == 1
    assert second.events("submitted")[0]["job_id"] in box.run("sacct", "-nX", "-P", "-o", "JobID")
    assert (first.events("started")[-1]["step"] or 0) >= 20, "it goes on where it was"


@pytest.mark.parametrize("gpus, nodes", [(2, 1), (1, 2)])
def test_an_expert_on_two_gpus(box: Box, on_slurm: Path, tmp_path: Path, gpus: int, nodes: int) -> None:
    """One process per GPU, on one node or two: the losses of one process, up to the rounding of bf16."""
    project = tmp_path / "project"
    shutil.copytree(on_slurm, project, symlinks=True)
    run = Run(box, project, "0", gpus=gpus, nodes=nodes)
    before = [row["loss"] for row in run.rows()]
    run.start("--force")
    run.finish()
    started = run.events("started")[-1]
    assert started["n_tasks"] == 2
    assert started["gpus"] == ("0,1" if gpus == 2 else started["gpus"][0])
    assert [row["loss"] for row in run.rows()] == pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize("everything", [True, False], ids=["Ctrl-C", "kill -INT of Snakemake alone"])
def test_ctrl_c_cancels_every_job(box: Box, prepared: Path, tmp_path: Path, everything: bool) -> None:
    project = tmp_path / "project"
    run = Run.of_copy(box, prepared, project, "0")
    run.start("results/experts/1/model.safetensors", "results/experts/2/model.safetensors")
    run.reach(5)
    run.kill(signal.SIGINT, everything=everything)
    run.finish(ok=False, timeout=60)
    ids = [
        row["job_id"]
        for path in project.glob("results/slurm/*/")
        for row in events.read(path)
        if row["event"] == "submitted"
    ]
    wait(lambda: not set(ids) & {row["JobID"] for row in box.squeue()}, 30, "the end of every job")
