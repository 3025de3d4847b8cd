"""One Slurm cluster per test process. Where Slurm cannot be had, the tests of this folder are skipped and counted in the last line."""

import signal
from collections.abc import Iterator

import pytest

from .box import Box, install

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell ignores it for what it starts in the background, as `make test` does


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
