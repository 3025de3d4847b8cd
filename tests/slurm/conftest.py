"""One Slurm cluster per test process. Where Slurm cannot be had, the tests of this folder are skipped and counted in the last line."""

from collections.abc import Generator, Iterator

import pytest

from .box import Box, install


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


@pytest.fixture(autouse=True)
def clear_box(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the cluster, the next one gets it whole and idle."""
    yield
    if "box" in request.fixturenames:
        request.getfixturevalue("box").clear()


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
