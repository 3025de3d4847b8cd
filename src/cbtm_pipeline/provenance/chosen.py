"""Experts whose learning rate was searched: which candidate they come from, and which one nothing needs."""

from pathlib import Path
from typing import Any

from cbtm_pipeline import plan, plan_search
from cbtm_pipeline.config import Config
from cbtm_pipeline.provenance import records
from cbtm_pipeline.provenance.records import DAMAGED, Read


def is_adopted(cfg: Config, rule: str, expert: str | None) -> bool:
    """Whether a job makes a chosen candidate the expert, and trains nothing (rule `adopt`)."""
    if rule != "train_expert" or expert is None or plan_search.MARK in expert:
        return False
    return plan_search.is_searched(cfg, expert)


def training(cfg: Config, rule: str, expert: str | None, read: Read) -> str:
    """The training that the expert of a job comes from: itself, or the chosen candidate."""
    assert expert
    if not is_adopted(cfg, rule, expert):
        return expert
    return plan_search.candidate(expert, read("choose", plan_search.kind(expert))["chosen"])


def content(cfg: Config, rule: str, expert: str | None, read: Read) -> dict[str, Any]:
    """The plan of a job as its record keeps it. `read` is asked for the choice of a rate only."""
    if rule == "train_expert":
        return plan.content(cfg, rule, training(cfg, rule, expert, read))
    return plan.content(cfg, rule, expert)


def is_out(outdir: Path, rule: str, expert: str | None, record: dict[str, Any]) -> bool:
    """Whether a job is a candidate whose rate was not chosen: then nothing needs its weights.

    `record` is its card.
    """
    if rule != "train_expert" or expert is None or plan_search.MARK not in expert:
        return False
    try:
        choice = records.read(outdir, "choose", plan_search.kind(expert))
        name = plan_search.candidate(plan_search.base(expert), choice["chosen"])
        return name != expert and choice["made_from"].get(expert) == record["seal"]
    except DAMAGED:
        return False
