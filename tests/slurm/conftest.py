"""One Slurm cluster per test process. Without Slurm, these tests are skipped; the last line counts them."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import faults
from .box import Box
from .launchers import RESOURCES, Start
from .machine import install

# A shell that starts a process in the background, as `make test` does, makes it ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    if reason := install():
        pytest.skip(f"Slurm: {reason}")
    box = Box(tmp_path_factory.mktemp("box"))
    try:
        box.start()
        yield box
    finally:
        box.stop()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has all inputs of 16 experts, and no expert; tests must leave it as it is."""
    return faults.prepare(tmp_path_factory.mktemp("prepared") / "project")


@pytest.fixture(autouse=True)
def clear_box(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the next test a whole and idle cluster, whatever this test did to it."""
    yield
    if "box" in request.fixturenames:
        request.getfixturevalue("box").clear()


@pytest.fixture
def start(box: Box, tmp_path: Path) -> Start:
    """Start a launcher of a shell script that may write to `out`."""

    def launcher(
        script: str, *options: str, env: dict[str, str] = box.env, **resources: object
    ) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "cbtm_pipeline.slurm.launch",
            "--name",
            "job",
            "--folder",
            "slurm",
            "--outputs",
            "out",
            *options,
        ]
        command += ["--resources", json.dumps({**RESOURCES, **resources}), "--", "bash", "-c", script]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    return launcher
