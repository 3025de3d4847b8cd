"""The command `cbtm`: its subcommands, and what it does not load."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cbtm_pipeline import __main__

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


def test_cbtm_is_a_command() -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "cbtm"
    ].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("command", [None, *__main__.MODULES])
def test_help_comes_without_torch(tmp_path: Path, command: str | None) -> None:
    arguments = [command] if command else []
    code = "import atexit, sys; atexit.register(lambda: print({'torch', 'transformers'} & {*sys.modules}))\n"
    code += (
        f"from cbtm_pipeline import __main__; sys.argv = {['cbtm', *arguments, '--help']}; __main__.main()"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith("usage: cbtm " + " ".join(arguments))
    assert printed.endswith("\nset()\n")
