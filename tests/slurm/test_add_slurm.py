"""`cbtm add-expert --profile slurm`: each of its jobs is a Slurm job, and a killed one goes on."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 600


def command(*argv: str) -> list[str]:
    words = ["add-expert", "more", "--corpus", "more.jsonl", "--steps", str(STEPS), *argv]
    return [sys.executable, "-m", "cbtm_pipeline", *words]


def copied(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished, folder, symlinks=True)
    write_corpus(folder / "more.jsonl", rng_seed=3)
    return folder


def weights(project: Path) -> bytes:
    return (project / "results/ensemble-more/experts/more/model.safetensors").read_bytes()


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
    submitted = {
        path.parent.name: [row["event"] for row in events.read(path.parent)]
        for path in there.glob("results/added/more/slurm/*/events.jsonl")
    }
    assert submitted.keys() == {"shard-more", "embed-more", "expert-more"}
    assert submitted["expert-more"].count("submitted") == 1, (
        "the second command waited for the first one's job"
    )
