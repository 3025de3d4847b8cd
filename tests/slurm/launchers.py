"""What tests of one launcher share. The fixture `start` of conftest.py starts it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from cbtm_pipeline.slurm import events

Start = Callable[..., subprocess.Popen]
RESOURCES = {"slurm_partition": "gpu", "runtime": 5, "mem_mb": 200}


def end_of(launcher: subprocess.Popen, status: int) -> str:
    """Wait for the end of a launcher, which has to have this exit status. Returns what it printed."""
    printed = launcher.communicate(timeout=90)[1]
    assert launcher.returncode == status, printed
    return printed


def says(launcher: subprocess.Popen, words: str) -> str:
    """Wait for the launcher's next line with these words, and return that line."""
    assert launcher.stderr
    return next(line for line in launcher.stderr if words in line)


def when(file: str, command: str) -> str:
    """A script that runs a command as soon as a file is there."""
    return f"while [ ! -e {file} ]; do sleep 0.1; done; {command}"


def submitted(folder: Path) -> list[str]:
    return [row["job_id"] for row in events.read(folder / "slurm/job") if row["event"] == "submitted"]


def started(folder: Path) -> list[dict]:
    return [row for row in events.read(folder / "slurm/job") if row["event"] == "started"]
