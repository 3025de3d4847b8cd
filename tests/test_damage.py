"""A run whose files are damaged at random places: nothing is used silently, nothing ends in a stack."""

import shutil
from pathlib import Path

import pytest

import damage

pytestmark = pytest.mark.slow


def test_flipped_bits_and_cuts_are_refused_or_unused(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    counts, found = damage.faults(project, 25, rng_seed=0)
    assert not found
    assert counts["refused"] > counts["unused"] / 2 > 0, counts
