"""What tests of several modules share."""

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from made_project import make_project, snakemake


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after one whole run, one for all processes; tests that use it must leave it as it is."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    project = shared / "finished/project"
    with (shared / "finished.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "finished/done").exists():
            snakemake(make_project(project), "--cores", "2")
            (shared / "finished/done").touch()
    return project


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """After all that pytest prints: how many tests had no Slurm, and why."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        skipped = [report.longrepr[2] for report in reporter.stats.get("skipped", [])]
        reasons = [reason.removeprefix("Skipped: Slurm: ") for reason in skipped if reason.startswith("Skipped: Slurm: ")]
        if reasons:
            reporter.write_line(f"Slurm: {len(reasons)} {'tests' if len(reasons) > 1 else 'test'} not run: {reasons[0]}")
    return result
