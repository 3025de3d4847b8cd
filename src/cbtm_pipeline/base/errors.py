"""Parts of error messages that several modules share."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN_CONFIG = "config.json"  # in the folder of a run: its whole config
Advice = str | Callable[[], str]  # what to do; a function is asked only where something is wrong


def said(advice: Advice) -> str:
    """The words of an advice."""
    return advice if isinstance(advice, str) else advice()


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's error, at most 200 characters; the error's type if it has no text."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def make_again(path: str | Path) -> str:
    """The advice for a file of a run, or of its folder's request, that is damaged.

    It reads the config of the run, so ask for it only where something is wrong (`Advice`).
    """
    if _is_of_request(path):
        return f"Remove {output_of(path)}, and type the same command again."
    output = output_of(path)
    command = f"{_snakemake(path)} --force {shlex.quote(_target(output))}"
    if output.name == "model.safetensors" and output != Path(path):  # the weights themselves may be whole
        return f"Bring it back from a copy, or train the model again: {command}"
    return f"Make it again: {command}"


def run_again(path: str | Path) -> str:
    """The advice for a file that is whole, but not of this run: a start makes again what does not fit."""
    if _is_of_request(path):
        return make_again(path)
    return f"Start the run again, which makes what does not fit: {_snakemake(path)}"


def _is_of_request(path: str | Path) -> bool:
    """Whether a file belongs to what a command was asked for, and not to a run of the workflow."""
    return any((folder / "request.json").is_file() for folder in Path(path).parents[:3])


def output_of(path: str | Path) -> Path:
    """The output of the workflow that a file comes with: a record, with a tokenizer or a model beside it."""
    path = Path(path)
    if path.name not in ("card.json", "files.json") or path.parent.name == "ensemble":
        return path
    return path.with_name("tokenizer.json" if path.parent.name == "tokenizer" else "model.safetensors")


def make(output: Path) -> str:
    """The command that makes a missing output of a run."""
    return f"{_snakemake(output)} {shlex.quote(_target(output))}"


def _snakemake(path: str | Path) -> str:
    """The command that starts the run of a file, with the config that the run left in its folder.

    So it works whatever --configfile and --config the run was started with.
    """
    found = _run(path)
    config = f" --configfile {shlex.quote(str(Path(found[1]) / RUN_CONFIG))}" if found else ""
    return f"snakemake --cores 2{config}"


def _target(output: Path) -> str:
    """The name by which the workflow knows an output."""
    found = _run(output)
    return str(Path(found[1]) / output.resolve().relative_to(found[0])) if found else str(output)


def _run(path: str | Path) -> tuple[Path, str] | None:
    """The folder of the run of a file, and its name in the run's config. None if it is not found there."""
    for folder in Path(path).resolve().parents:
        outdir = _outdir(folder / RUN_CONFIG)
        if outdir is not None:
            return (folder, outdir) if Path(outdir).resolve() == folder else None
    return None


def _outdir(config: Path) -> str | None:
    """The key `outdir` of a run's config; None if this is none, but perhaps the config of a model."""
    try:
        content: Any = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_run = isinstance(content, dict) and isinstance(content.get("corpus"), dict)
    outdir = content.get("outdir") if is_run else None
    return outdir if isinstance(outdir, str) else None
