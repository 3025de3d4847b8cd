"""Commands that run a small workflow of their own: their request, their options, and Snakemake itself.

`cbtm add-expert` and `cbtm score` write a request and a config into a folder. Snakemake makes all else there.
The same command goes on after whatever ended it. A second one at the same time is refused.
"""

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.base.publish import publish
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files

REQUEST = "request.json"
KIND = "request"
CONFIG = "config.json"
WRITTEN = (REQUEST, CONFIG, content.PLANNED)
LOCK = ".command.lock"  # of a command, to its end; Snakemake has a lock of its own
PRECIOUS = ("work", "experts", "scores")  # what jobs leave that nobody wants to lose
REMADE = ("shards", "branch.npz", "parent", "route")  # what else they leave
PLACES = {"tokenizer", "ensemble", "weights"}  # entries that say where something lies, not what it is


def add_options(p: argparse.ArgumentParser, cores: str) -> None:
    """Add `--profile`, `--cores` and `--dry-run`. `cores` is the help of the second."""
    p.add_argument("--profile", help="of Snakemake, such as slurm: each job runs where it says")
    p.add_argument("--cores", type=cli.whole, metavar="N", help=cores)
    p.add_argument("--dry-run", "-n", action="store_true", help="show the jobs and run nothing")


@contextlib.contextmanager
def begun(folder: Path, asked: dict[str, Any], cfg: config.Config, dry_run: bool) -> Iterator[None]:
    """Hold the folder, with request and config in it. After a dry run, it is as it was before.

    Raises ValueError if another command is at work there, or if trainings or scores there were begun with
    another request. What an attempt without either has left is made again.
    """
    if dry_run and (folder / REQUEST).exists() and not _differences(folder, asked):
        yield
        return
    lock.hold(folder, name=LOCK)
    try:
        lock.hold(folder)  # a killed command may have left its Snakemake alive
        lock.release(folder)  # Snakemake will hold it
        names = check_begun(folder, asked)
        before = {name: _bytes(folder / name) for name in WRITTEN}
        if names and not dry_run:
            for name in REMADE:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _write(folder, asked, cfg)
        try:
            yield
        finally:
            if dry_run:
                _put_back(folder, before)
    finally:
        lock.release(folder, LOCK)


def check_begun(folder: Path, asked: dict[str, Any]) -> list[str]:
    """The entries in which a request that is there is another one.

    Raises ValueError if there are any, and trainings or scores were begun with it.
    """
    names = _differences(folder, asked) if (folder / REQUEST).exists() else []
    if names and any((folder / name).exists() for name in PRECIOUS):
        raise ValueError(
            f"{folder}: was begun with another {', '.join(names)}. Expected the same command. Choose another "
            "name, or remove the folder."
        )
    return names


def check_kept(folder: Path, asked: dict[str, Any]) -> None:
    """Raise ValueError unless the folder still has this request."""
    if names := _differences(folder, asked):
        raise ValueError(
            f"{folder}: has now another {', '.join(names)}. Expected what this command has asked for. Type "
            "it again."
        )


def is_asked(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder was begun with this request."""
    return (folder / REQUEST).exists() and not _differences(folder, asked)


def _differences(folder: Path, asked: dict[str, Any]) -> list[str]:
    """The entries in which the request of the folder is another one."""
    before = artifact.read_sealed(folder / REQUEST, KIND)
    return [
        name for name in asked if name not in PLACES and (before.get(name) or None) != (asked[name] or None)
    ]


def _write(folder: Path, asked: dict[str, Any], cfg: config.Config) -> None:
    artifact.write_sealed(folder / REQUEST, asked)
    config.write(cfg, folder / CONFIG)
    content.write_planned(corpus_files.find(cfg.corpus.train, None, cfg.outdir), folder / content.PLANNED)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _put_back(folder: Path, before: dict[str, bytes | None]) -> None:
    """Undo what a dry run has written. A folder that it has made goes."""
    if before[REQUEST] is None and {path.name for path in folder.iterdir()} <= {*WRITTEN, lock.NAME, LOCK}:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # others are beside it
            folder.parent.rmdir()
        return
    for name, content_before in before.items():
        if content_before is None:
            (folder / name).unlink()
        else:
            with publish(folder / name) as tmp:
                tmp.write_bytes(content_before)


def run(
    snakefile: str, folder: Path, args: argparse.Namespace, expected: str, targets: Sequence[str] = ()
) -> None:
    """Run a workflow whose config lies in the folder. `targets` are the files to make; none: the default.

    Raises ValueError if it fails; `expected` says what should have come out.
    """
    if status := _wait(_command(snakefile, folder, args, targets)):
        raise ValueError(
            f"snakemake: ended with status {status}. Expected {expected}. See {folder}/logs, mend what they "
            "name, then type the command again."
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
    return [*words, "--configfile", str(folder / CONFIG)]


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
