"""The command `cbtm`: its subcommands, and what it does not load."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_status_loads_no_heavy_package() -> None:
    code = "import sys, cbtm_pipeline.__main__, cbtm_pipeline.status; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {
        "torch",
        "transformers",
        "scipy",
        "sklearn",
        "pyarrow",
        "rich",
        "submitit",
        "snakemake",
    } & set(loaded)


def test_cbtm_is_a_command_with_two_subcommands(tmp_path: Path) -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "cbtm"
    ].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for arguments in (["--help"], ["status", "--help"], ["doctor", "--help"]):
        command = [sys.executable, "-m", "cbtm_pipeline", *arguments]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert printed.startswith("usage: cbtm " + " ".join(arguments[:-1]))
