"""Where the clusters come from whose experts are evaluated: of the second round, or of the only one."""

from pathlib import Path
from typing import Any

from cbtm_pipeline import plan_first
from cbtm_pipeline.config import Config
from cbtm_pipeline.provenance import made_from, records
from cbtm_pipeline.provenance.records import Read


def rule(cfg: Config) -> str:
    """The rule that gives documents to the experts that are evaluated."""
    return "second_round" if cfg.cluster.second_round else "assign"


def clusterer(cfg: Config, read: Read) -> dict[str, Any]:
    """Of the record of the centres, what others read: the seal, and what they were made from."""
    if not cfg.cluster.second_round:
        return read("fit_kmeans")
    origin = read("second_round")["made_from"]
    return {"seal": origin["clusterer"], "made_from": origin}


def terms(cfg: Config) -> dict[str, Any]:
    """The record of the terms."""
    return records.read_top_terms(
        Path(cfg.outdir), "second_round" if cfg.cluster.second_round else "fit_kmeans"
    )


def identities(cfg: Config, read: Read) -> dict[str, str]:
    """What the second round would be made from now. Its clusterer lies beside its record."""
    scores = {name: read("score_training", name) for name in plan_first.firsts(cfg)}
    origin = made_from.second_clusterer(read("embed"), read("assign"), scores)
    seal = records.read_second_clusterer(Path(cfg.outdir))["seal"]
    return made_from.second_round(read("shard"), {"seal": seal, "made_from": origin})
