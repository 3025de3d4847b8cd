"""Second links to what a start makes again, in `<outdir>/kept`: nothing is lost before the new one is there.

Snakemake deletes the outputs of a job before it starts. So a start first links them here. A job that turns
out to be unchanged gets them back. Trained models stay here even after others have replaced them: under
`kept/experts/<id>-<fingerprint>`, where the fingerprint is of plan and inputs. A later start with that plan
and these inputs takes them from here again.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbtm_pipeline import plan_first, plan_search
from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.publish import fresh, link_or_copy
from cbtm_pipeline.provenance import expert_files, records
from cbtm_pipeline.provenance.expert_files import WEIGHTS
from cbtm_pipeline.provenance.stale import DAMAGED, Job

FOLDER = "kept"
SEARCH = "search"  # the folder of the choices


def keep(outdir: Path, some: Iterable[Job]) -> None:
    """Link the outputs of these jobs, for an expert its whole folder."""
    for job in some:
        if job.rule == "train_expert":
            _keep_expert(outdir, outdir / f"experts/{job.expert}")
        else:
            for output in job.outputs:
                _link(outdir / output, outdir / FOLDER / output)


def has(outdir: Path, job: Job) -> bool:
    """Whether outputs of this job may be kept."""
    if job.rule == "train_expert":
        name = plan_search.base(job.expert or "")
        return any(path.name.rpartition("-")[0] == name for path in replaced(outdir))
    return any((outdir / FOLDER / output).exists() for output in job.outputs)


def surplus(outdir: Path, experts: Iterable[str]) -> list[str]:
    """Experts in the outdir that are none of these `experts`, the run's own."""
    folder, known = outdir / "experts", set(experts)
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name not in known and (path / "card.json").exists())
    return sorted(path.name for path in found if (path / WEIGHTS).exists())


def put_away(outdir: Path, experts: Iterable[str], packs: bool) -> None:
    """Move experts that no longer belong to the run here, and delete what was made from them.

    Without random experts, the random clusters are deleted, too, and without a first round the second one: no
    training needs them. So is the folder of the ensemble unless the run `packs` one: it would be that of
    another config.
    """
    for name in surplus(outdir, experts):
        _keep_expert(outdir, outdir / f"experts/{name}")
        shutil.rmtree(outdir / f"experts/{name}", ignore_errors=True)
        (outdir / f"scores/{name}.npz").unlink(missing_ok=True)
        (outdir / f"eval/tasks/{name}.json").unlink(missing_ok=True)
    known = set(experts)
    _drop_search(outdir, known)
    if not any(name.startswith("random-") for name in known):
        shutil.rmtree(outdir / "random", ignore_errors=True)
    if not any(name.startswith(plan_first.FIRST) for name in known):
        shutil.rmtree(outdir / "second", ignore_errors=True)
    if not packs and (outdir / "ensemble/files.json").exists():
        shutil.rmtree(outdir / "ensemble", ignore_errors=True)


def _drop_search(outdir: Path, known: set[str]) -> None:
    """Delete what is left of candidates that are not `known`, and the choices of a search without any."""
    for path in (outdir / "experts").glob(f"*{plan_search.MARK}*"):
        if path.name not in known:  # it has no weights any more
            shutil.rmtree(path, ignore_errors=True)
    kinds = {plan_search.kind(name) for name in known if plan_search.MARK in name}
    for path in (outdir / SEARCH).glob("*.json"):
        if path.stem not in kinds:
            path.unlink()
    with contextlib.suppress(OSError):
        (outdir / SEARCH).rmdir()  # if it is empty


def drop_candidates(outdir: Path) -> None:
    """Delete the weights of all candidates that were not chosen. Their logs and cards stay."""
    for path in (outdir / SEARCH).glob("*.json"):
        choice = artifact.read_sealed(path, "choice")
        for name in choice["made_from"]:
            if name != plan_search.candidate(plan_search.base(name), choice["chosen"]):
                (outdir / "experts" / name / WEIGHTS).unlink(missing_ok=True)


def drop_tasks(outdir: Path) -> None:
    """Delete the results of tasks, which the run no longer has."""
    shutil.rmtree(outdir / "eval/tasks", ignore_errors=True)
    for name in ("tasks.json", "tasks.txt"):
        (outdir / "eval" / name).unlink(missing_ok=True)


def give_back(outdir: Path, job: Job, made_with: dict[str, Any], made_from: dict[str, str]) -> bool:
    """Put the outputs of a job back in their place, if they were made with this plan and from these inputs.

    Returns False if there are none. Then the job has to run, and what is kept of other rules than
    `train_expert` is dropped.
    """
    if job.rule == "train_expert":
        name = f"{plan_search.base(job.expert or '')}-{_fingerprint(made_with, made_from)}"
        kept = outdir / FOLDER / "experts" / name
        return _give_back_expert(kept, outdir / f"experts/{job.expert}")
    for output in job.outputs:
        if not (outdir / output).exists():
            _link(outdir / FOLDER / output, outdir / output)
    try:
        record = records.read(outdir, *job)
        same = (record["made_with"], record["made_from"]) == (made_with, made_from)
        if same and not records.missing(outdir, *job, record):
            return True
    except DAMAGED:
        pass
    for output in job.outputs:
        for path in (outdir / output, outdir / FOLDER / output):
            path.unlink(missing_ok=True)
    return False


def tidy(outdir: Path, keep_replaced: bool) -> None:
    """Drop what is in its place again: everything but replaced models, or these as well.

    Without `keep_replaced`, the weights of candidates that were not chosen go, too.
    """
    if not keep_replaced:
        drop_candidates(outdir)
    folder = outdir / FOLDER
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != "experts" or not keep_replaced:
            shutil.rmtree(path, ignore_errors=True)
    for path in (folder / "experts").glob("*-*"):
        name = path.name.rpartition("-")[0]
        current = [outdir / "experts" / name, *(outdir / "experts").glob(f"{name}{plan_search.MARK}*")]
        if any(_name(folder) == path.name and (folder / WEIGHTS).exists() for folder in current):
            shutil.rmtree(path, ignore_errors=True)
    for path in (folder / "experts", folder):
        with contextlib.suppress(OSError):
            path.rmdir()  # if it is empty


def replaced(outdir: Path) -> list[Path]:
    """The folders of kept models."""
    return sorted((outdir / FOLDER / "experts").glob("*-*"))


def _keep_expert(outdir: Path, folder: Path) -> None:
    """Link the weights of an expert and copy the rest; move the folder where there are no hard links.

    The rest is copied because transformers writes JSON in place, which would change both ends of a link.
    """
    if not (folder / WEIGHTS).exists():
        return
    kept = outdir / FOLDER / "experts" / _name(folder)
    shutil.rmtree(kept, ignore_errors=True)
    partial = kept.with_name(f".{kept.name}")
    fresh(partial)
    try:
        for path in expert_files.all_files(folder):
            other = partial / path.relative_to(folder)
            other.parent.mkdir(parents=True, exist_ok=True)
            if path.name == WEIGHTS:
                os.link(path, other)
            else:
                with artifact.publish(other) as tmp:
                    shutil.copyfile(path, tmp)
    except OSError:
        shutil.rmtree(partial)
        _move(folder, kept)
    else:
        partial.rename(kept)


def _move(path: Path, other: Path) -> None:
    """Move a file or folder, also to another file system. `other` is there whole or not at all."""
    try:
        path.rename(other)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    partial = other.with_name(f".{other.name}")
    if path.is_dir():
        fresh(partial)
        shutil.copytree(
            path, partial, ignore=shutil.ignore_patterns(expert_files.STAGING), dirs_exist_ok=True
        )
        partial.rename(other)
    else:
        with artifact.publish(other) as tmp:
            shutil.copyfile(path, tmp)


def _give_back_expert(kept: Path, folder: Path) -> bool:
    """Put a kept expert back, its weights last. Returns False unless it is there and whole."""
    try:
        expert_files.read_card(kept / WEIGHTS)
    except DAMAGED:
        return False
    for path in expert_files.all_files(kept):
        with artifact.publish(folder / path.relative_to(kept)) as tmp:
            link_or_copy(path, tmp)
    shutil.rmtree(folder / expert_files.STAGING, ignore_errors=True)  # of a training that was killed
    shutil.rmtree(kept)
    return True


def _name(folder: Path) -> str:
    """The name of an expert's folder among the kept ones: its id and the fingerprint of its record.

    A candidate has the id of its expert. So it is found again, wherever its weights were.
    """
    name = plan_search.base(folder.name)
    try:
        card = artifact.read_sealed(folder / "card.json", "expert")
        return f"{name}-{_fingerprint(card['made_with'], card['made_from'])}"
    except DAMAGED:
        return f"{name}-damaged"


def _fingerprint(made_with: dict[str, Any], made_from: dict[str, str]) -> str:
    return artifact.fingerprint([made_with, made_from])[:12]


def _link(path: Path, other: Path) -> None:
    """Make `other` a second link of `path`, if that is there; move it where there are no hard links."""
    if not path.exists():
        return
    other.parent.mkdir(parents=True, exist_ok=True)
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        _move(path, other)
