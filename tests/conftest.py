"""What tests of several modules share."""

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from browser import chromium
from made_project import make_project, snakemake


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after one whole run, whose terminal is printed.txt; tests must leave it as it is.

    All workers share it, and all processes of `make test`, which names a folder for it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # of all workers
    base = Path(os.environ.get("SHARED_BY_TESTS", base))
    folder = base / "finished/project"
    with filelock.FileLock(base / "finished.lock"):
        if not (folder / "printed.txt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(folder)
            (folder / "printed.txt").write_text(snakemake(folder, "--cores", "2"))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, for tests of pages."""
    from playwright.sync_api import sync_playwright  # most tests need none

    program = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """After all that pytest prints: how many tests had no Slurm, and why."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        skipped = [report.longrepr[2] for report in reporter.stats.get("skipped", [])]
        reasons = [
            reason.removeprefix("Skipped: Slurm: ")
            for reason in skipped
            if reason.startswith("Skipped: Slurm: ")
        ]
        if reasons:
            reporter.write_line(
                f"Slurm: {len(reasons)} {'tests' if len(reasons) > 1 else 'test'} not run: {reasons[0]}"
            )
    return result
