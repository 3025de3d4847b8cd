"""Outputs that a run of a study takes from another run, instead of making them once more.

The workflow says which run lends (ops/study.py). Whether the outputs fit is decided here, by the records: a
job takes them only if they were made with its plan and from its inputs. Otherwise it makes its own. So each
run's folder is complete, and is what the run alone would have made.

Large files become second links, which cost no space. Small ones are copied, because other programs write
them in place. A link that one run deletes or replaces leaves the other run's as it is.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import inside
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.base.publish import link_or_copy, publish
from cbtm_pipeline.provenance import expert_files, records
from cbtm_pipeline.provenance.stale import DAMAGED, DEMO, Job

# Rules whose outputs may be lent. The others read results of the whole run, or write texts about it.
DEMO_RULE = "demo_corpus"  # it has no record: its output is the same everywhere
LENT = (DEMO_RULE, "tokenizer", "shard", "embed", "fit_kmeans", "assign", "assign_random")
LENT += ("score_training", "second_round", "train_expert", "score_expert", "route", "eval_task")
LINKED = {".safetensors", ".arrow", ".parquet", ".npz", ".npy", ".zst"}


def take(lender: Path, outdir: Path, job: Job, made_with: dict[str, Any], made_from: dict[str, str]) -> bool:
    """Put the lender's outputs of a job into `outdir`, its record last.

    Returns False, and changes nothing, unless they are whole and were made with this plan from these inputs.
    """
    try:
        record = records.read(lender, *job)
        if (record["made_with"], record["made_from"]) != (made_with, made_from):
            return False
        if records.missing(lender, *job, record):
            return False
        records.check_beside(lender, job.rule, record)
        if job.rule == "train_expert":
            expert_files.read_card(lender / f"experts/{job.expert}" / expert_files.WEIGHTS)
    except DAMAGED:
        return False
    for name in _files(lender, job, record):
        _copy_or_link(lender / name, outdir / name)
    return True


def take_demo(lender: Path, outdir: Path) -> bool:
    """The same for the built-in corpus, which has no record: it is the same everywhere."""
    if not (lender / DEMO).exists():
        return False
    _copy_or_link(lender / DEMO, outdir / DEMO)
    return True


def _files(lender: Path, job: Job, record: dict[str, Any]) -> list[str]:
    """The files of a job, below the outdir; the record comes last, for an expert its weights."""
    place = records.PLACES[job.rule].record.format(job.expert)
    if job.rule == "train_expert":
        found = expert_files.all_files(lender / Path(place).parent)
        return [str(path.relative_to(lender)) for path in found]
    inside.check(lender / place, record.get("files", []), partial(make_again, lender / place))
    beside = [str(Path(place).with_name(name)) for name in record.get("files", [])]
    names = dict.fromkeys([*beside, *job.outputs])
    return sorted(names, key=lambda name: name == place)


def _copy_or_link(path: Path, other: Path) -> None:
    with publish(other) as tmp:
        (link_or_copy if path.suffix in LINKED else shutil.copyfile)(path, tmp)
