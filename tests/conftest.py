"""What tests of several modules share."""

from pathlib import Path

import pytest

from made_project import make_project, snakemake


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after one whole run; tests that use it must leave it as it is."""
    folder = make_project(tmp_path_factory.mktemp("finished") / "project")
    snakemake(folder, "--cores", "2")
    return folder
