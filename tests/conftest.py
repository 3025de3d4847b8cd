"""What tests of several modules share, and how they are dealt out to processes (pytest -n)."""

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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the cluster in a box share one, so one process runs them all. They come first: they wait more than they compute."""
    on_box = [item for item in items if item.path.parent.name == "slurm"]
    for item in on_box:
        item.add_marker(pytest.mark.xdist_group("slurm"))
    items.sort(key=lambda item: item not in on_box)


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
