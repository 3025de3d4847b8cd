"""The ensemble that a command is about, as its user names it."""

import argparse
from pathlib import Path
from typing import Any

from cbtm_pipeline.inference import package
from cbtm_pipeline.ops import which_run


def add_options(p: argparse.ArgumentParser) -> None:
    """Add `--outdir`, `--configfile` and `--model`."""
    which_run.add_options(p)
    p.add_argument("--model", type=Path, metavar="DIR", help="folder of an ensemble, instead of a run's own")


def add_exclude(p: argparse.ArgumentParser) -> None:
    """Add `--exclude`."""
    p.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="leave this expert out, or all with a tag (tag:licence=cc-by-nc); may be given again",
    )


def without(args: argparse.Namespace) -> dict[str, Any]:
    """The setting `exclude`, if the options have it."""
    return {"exclude": args.exclude} if args.exclude else {}


def named(args: argparse.Namespace) -> Path:
    """The folder of the ensemble that these options name. Raises ValueError if there is none."""
    folder = args.model or which_run.named(args) / "ensemble"
    package.read_record(folder)
    return folder
