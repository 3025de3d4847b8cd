"""Commands that run a small workflow of their own: their request, their options, and Snakemake itself.

`cbtm add-expert` and `cbtm score` write a request and a config into a folder. Snakemake makes all else there.
The same command goes on after whatever ended it.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files

REQUEST = "request.json"
KIND = "request"
PLACES = {"tokenizer", "ensemble", "weights"}  # entries that say where something lies, not what it is


def add_options(p: argparse.ArgumentParser, cores: str) -> None:
    """Add `--profile`, `--cores` and `--dry-run`. `cores` is the help of the second."""
    p.add_argument("--profile", help="of Snakemake, such as slurm: each job runs where it says")
    p.add_argument("--cores", type=cli.whole, metavar="N", help=cores)
    p.add_argument("--dry-run", "-n", action="store_true", help="show the jobs and run nothing")


def keep(folder: Path, asked: dict[str, Any], cfg: config.Config) -> None:
    """Write request and config. Raises ValueError if the folder has been begun with another request."""
    path = folder / REQUEST
    if path.exists() and (folder / "shards/manifest.json").exists():
        before = artifact.read_sealed(path, KIND)
        names = [name for name in asked if name not in PLACES and before.get(name) != asked[name]]
        if names:
            raise ValueError(
                f"{folder}: was begun with another {', '.join(names)}. Expected the same command. Choose "
                "another name, or remove the folder."
            )
    artifact.write_sealed(path, asked)
    config.write(cfg, folder / "config.json")
    content.write_planned(corpus_files.find(cfg.corpus.train, None, cfg.outdir), folder / content.PLANNED)


def run(
    snakefile: str, folder: Path, args: argparse.Namespace, expected: str, targets: Sequence[str] = ()
) -> None:
    """Run a workflow whose config lies in the folder. `targets` are the files to make; none: the default.

    Raises ValueError if it fails; `expected` says what should have come out.
    """
    if status := _wait(_command(snakefile, folder, args, targets)):
        raise ValueError(
            f"snakemake: ended with status {status}. Expected {expected}. See {folder}/logs, then "
            "type the same command again."
        )


def _command(snakefile: str, folder: Path, args: argparse.Namespace, targets: Sequence[str]) -> list[str]:
    """The command line of Snakemake."""
    path = Path("workflow", snakefile)
    path = path if path.exists() else Path(__file__).parents[3] / path
    if not path.exists():
        raise ValueError(
            f"workflow/{snakefile}: no such file. Expected that of the project. Run this in its root."
        )
    words = [sys.executable, "-m", "snakemake", *targets, "--snakefile", str(path)]
    words += ["--profile", args.profile] if args.profile else []
    words += ["--cores", str(args.cores or 2)] if args.cores or not args.profile else []
    words += ["--dry-run"] if args.dry_run else []
    return [*words, "--configfile", str(folder / "config.json")]


def _wait(words: list[str]) -> int:
    """Run a command to its end, and return its status. Signals are for it: it cancels its jobs first."""
    process = subprocess.Popen(words)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # a terminal sends it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
