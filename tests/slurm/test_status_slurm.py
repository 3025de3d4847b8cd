"""`cbtm status` shows Slurm's jobs, and everything else when Slurm is away."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import made_training as made
from cbtm_pipeline import config
from cbtm_pipeline.slurm import events

from .box import Box
from .machine import wait


def show(box: Box, outdir: Path, *options: str) -> str:
    command = [sys.executable, "-m", "cbtm_pipeline", "status", str(outdir), *options]
    done = subprocess.run(command, env=box.env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_jobs_in_the_queue_and_none_when_slurm_is_away(box: Box, tmp_path: Path) -> None:
    config.write(made.make_config(), tmp_path / "config.json")
    jobs = {}
    for name in ("0", "1"):
        options = (
            "--nodelist=gpu3",
            "--exclusive",
            "--output=/dev/null",
            f"--job-name=expert-{name}",
            "--comment=token",
        )
        jobs[name] = box.run("sbatch", "--parsable", *options, "--wrap=sleep 600").strip()
        wait(lambda: box.state(jobs["0"]) == "RUNNING")
        folder = tmp_path / "slurm" / f"expert-{name}"
        folder.mkdir(parents=True)
        events.write_json(folder / "job.json", {"job_id": jobs[name], "token": "token", "fingerprint": "f"})
    wait(lambda: box.squeue(f"--jobs={jobs['1']}")[0]["Reason"] == "Resources")

    def rows() -> dict[str, dict]:
        (found,) = json.loads(show(box, tmp_path, "--json"))
        return {row["name"]: row for row in found["rows"]}

    zero, one = rows()["0"], rows()["1"]
    assert [zero[key] for key in ("state", "job", "job_state", "reason", "node")] == [
        "running",
        jobs["0"],
        "RUNNING",
        None,
        "gpu3",
    ]
    assert [one[key] for key in ("state", "job", "job_state", "reason", "node")] == [
        "waiting",
        jobs["1"],
        "PENDING",
        "Resources",
        None,
    ]

    box.signal(
        "slurmctld", signal.SIGTERM
    )  # it saves what it knows; killed, it may forget jobs of the last seconds
    printed = show(box, tmp_path)
    assert "Slurm does not answer (squeue: " in printed
    assert "7 experts: 5 waiting, 2 unknown" in printed
    box.start_slurmctld()

    box.run("scancel", jobs["0"])
    wait(lambda: rows()["0"]["job_state"] == "CANCELLED")
    assert rows()["0"]["state"] == "waiting"  # it had not begun
