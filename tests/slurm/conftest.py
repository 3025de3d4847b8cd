"""One Slurm cluster per test process. Where Slurm cannot be had, the tests of this folder are skipped and counted in the last line."""

from collections.abc import Generator, Iterator

import pytest

from .box import Box, install

FOLDER = "tests/slurm/"


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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """After everything that pytest prints: how many tests had no Slurm, and why."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = (
        [report.longrepr[2] for report in reporter.stats.get("skipped", []) if "Skipped: Slurm: " in report.longrepr[2]] if reporter else []
    )
    if reasons:
        reporter.write_line(f"Slurm: {len(reasons)} tests not run: {reasons[0].removeprefix('Skipped: Slurm: ')}")
    return result
