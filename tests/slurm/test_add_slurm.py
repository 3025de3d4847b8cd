"""`cbtm add-expert` and `cbtm score` on Slurm: each job is a Slurm job, and a killed command goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cbtm_pipeline.inference import package
from cbtm_pipeline.slurm import events
from made_project import write_corpus

from .box import Box
from .machine import wait
from .runs import write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 40


def command(*argv: str) -> list[str]:
    words = ["add-expert", "more", "--corpus", "more.jsonl", "--steps", str(STEPS), *argv]
    return [sys.executable, "-m", "cbtm_pipeline", *words]


def copied(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder, symlinks=True)
    write_corpus(folder / "more.jsonl", rng_seed=3)
    return folder


def weights(project: Path) -> bytes:
    return (project / "results/ensemble-more/experts/more/model.safetensors").read_bytes()


def jobs_of(folder: Path) -> dict[str, list[str]]:
    """The events of each Slurm job."""
    paths = folder.glob("slurm/*/events.jsonl")
    return {path.parent.name: [row["event"] for row in events.read(path.parent)] for path in paths}


def test_an_expert_added_on_slurm_and_killed_on_the_way_is_the_same(
    box: Box, finished: Path, tmp_path: Path
) -> None:
    here, there = copied(finished, tmp_path / "here"), copied(finished, tmp_path / "there")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(), cwd=here, env=environment, check=True)
    write_profile(there)
    slurm = {**box.env, "OMP_NUM_THREADS": "1"}
    words = command("--profile", "slurm")
    with subprocess.Popen(words, cwd=there, env=slurm, start_new_session=True) as first:
        state = there / "results/added/more/work/more/state"
        wait(lambda: list(state.glob("step-*")), 200, "saved state")
        os.killpg(first.pid, signal.SIGKILL)
    run = subprocess.run(words, cwd=there, env=slurm, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert weights(there) == weights(here)
    package.verify(there / "results/ensemble-more")
    submitted = jobs_of(there / "results/added/more")
    assert submitted.keys() == {"shard-more", "embed-more", "expert-more"}
    assert submitted["expert-more"].count("submitted") == 1, (
        "the second command waited for the first one's job"
    )


def test_text_scored_on_slurm_has_the_numbers_of_one_process(
    box: Box, finished: Path, tmp_path: Path
) -> None:
    project = copied(finished, tmp_path / "project")
    for name in ("dense", "dense-steps"):
        shutil.rmtree(project / "results/experts" / name)
    write_profile(project)
    words = [sys.executable, "-m", "cbtm_pipeline", "score", "more.jsonl", "--json", "--exclude", "1"]
    environment = {**box.env, "OMP_NUM_THREADS": "1"}
    jobs = [*words, "--profile", "slurm", "--name", "more"]
    with subprocess.Popen(jobs, cwd=project, env=environment, start_new_session=True) as first:
        shards = project / "results/scored/more/shards/manifest.json"
        wait(shards.exists, 200, "shards")
        os.killpg(first.pid, signal.SIGKILL)
    printed = subprocess.run(jobs, cwd=project, env=environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stdout + printed.stderr
    expected = subprocess.run(words, cwd=project, env=environment, capture_output=True, check=True)
    for row, other in zip(
        *(json.loads(out)["files"][0]["systems"] for out in (printed.stdout, expected.stdout)), strict=True
    ):
        assert row.pop("system") == other.pop("system") and row == pytest.approx(other, rel=1e-5)
    submitted = jobs_of(project / "results/scored/more")
    assert submitted.keys() == {"shard-more", "route-more", "score-0", "score-seed"}
    assert all(found.count("submitted") == 1 for found in submitted.values())
