"""A study on Slurm, killed in the middle and started again: shared parts once, the numbers of a local run."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from cbtm_pipeline.base import artifact
from cbtm_pipeline.slurm import events
from made_project import make_project, snakemake_command

from .box import Box
from .machine import wait
from .runs import write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STUDY = {
    "base": ["small.yaml"],
    "outdir": "results/study",
    "grid": {"cluster.k": [1, 2], "eval.bootstrap": [200, 201]},
}
FEW = {"train": {"controls": []}, "route": {"fix_after": [], "hysteresis": [1]}, "embed": {}, "eval": {}}


def made(folder: Path) -> Path:
    project = make_project(folder, **FEW)
    (project / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return project


def submitted(project: Path) -> dict[str, int]:
    """How often a job was submitted, by its name, over all runs."""
    found: dict[str, int] = {}
    for path in project.glob("results/study/runs/*/slurm/*/events.jsonl"):
        n = sum(row["event"] == "submitted" for row in events.read(path.parent))
        found[path.parent.name] = found.get(path.parent.name, 0) + n
    return found


def test_a_study_killed_in_the_middle_makes_shared_parts_once(
    box: Box, finished: Path, tmp_path: Path
) -> None:
    there = made(tmp_path / "there")
    study = ("-s", "workflow/study.smk")
    write_profile(there)
    words = snakemake_command(*study, "--profile", "slurm", configfiles=["study.yaml"])
    environment = {**box.env, "OMP_NUM_THREADS": "1"}
    with (there / "first.log").open("wb") as log:
        first = subprocess.Popen(
            words, cwd=there, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    seeds = there / "results/study/runs/k=1,bootstrap=200/experts/seed/model.safetensors"
    wait(seeds.exists, 300, "the first seed")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(words, cwd=there, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    found = submitted(there)
    once = {"tokenizer": 1, "shard": 1, "embed": 1, "fit_kmeans": 2, "assign": 2, "route": 2}
    once |= {f"{kind}-{name}": 1 for kind in ("expert", "score") for name in ("seed", "dense")}
    own = {"expert-0": 2, "expert-1": 1, "score-0": 2, "score-1": 1, "eval_ensemble": 4}
    for name, n in {**once, **own}.items():
        assert found[name] == n, f"{name}: {found}"
    found, expected = (
        {row["system"]: row["nll"] for row in artifact.read_json(folder / "eval/metrics.json")["systems"]}
        for folder in (there / "results/study/runs/k=2,bootstrap=200", finished / "results")
    )
    assert found.items() <= expected.items()
