"""Experts whose learning rate was searched: which candidate they come from, and which one nothing needs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cbtm_pipeline import plan, plan_search
from cbtm_pipeline.base import artifact
from cbtm_pipeline.config import Config
from cbtm_pipeline.provenance import records
from cbtm_pipeline.provenance.records import DAMAGED, Read

Choices = dict[str, dict[str, Any]]  # search/<kind>.json by kind


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


def read(cfg: Config, paths: Iterable[Path], cards: Mapping[str, dict[str, Any]]) -> Choices:
    """The choices of all searched kinds. `cards` are those of the experts.

    Raises ValueError if one is missing, or chose another candidate than an expert is.
    """
    given = {path.stem: path for path in paths}
    found = {}
    for kind, names in plan.searched(cfg).items():
        if kind not in given:
            raise ValueError(
                f"--choices: no {kind}.json. Expected that of each kind of model. Add it to the command line."
            )
        found[kind] = artifact.read_sealed(given[kind], "choice")
        for name in names:
            candidate = plan_search.candidate(name, found[kind]["chosen"])
            artifact.check_made_from(given[kind], found[kind], candidate, cards[name]["seal"])
    return found


def search_flops(cfg: Config, cards: Mapping[str, dict[str, Any]], choices: Choices) -> dict[str, float]:
    """For each model, the training FLOPs of all its candidates; empty without a search.

    The models of a kind share those of the kind: they differ only where a candidate diverged.
    """
    if not choices:
        return {}
    flops = {name: card["train_flops"] for name, card in cards.items()}
    for kind, names in plan.searched(cfg).items():
        whole = sum(row["train_flops"] for row in choices[kind]["candidates"])
        flops |= dict.fromkeys(names, whole / len(names))
    return flops


def shown(choices: Choices) -> dict[str, Any]:
    """What metrics.json says of the search, by kind: the chosen rate, and what each candidate came to."""
    return {kind: {key: one[key] for key in ("chosen", "candidates")} for kind, one in choices.items()}
