"""One Slurm cluster per test process. Without Slurm, these tests are skipped; the last line counts them."""

import signal
from collections.abc import Iterator

import pytest

from .box import Box
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


@pytest.fixture(autouse=True)
def clear_box(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the next test a whole and idle cluster, whatever this test did to it."""
    yield
    if "box" in request.fixturenames:
        request.getfixturevalue("box").clear()
