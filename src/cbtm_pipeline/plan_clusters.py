"""The plans of the rules that make clusters: `fit_kmeans`, `assign` and `assign_random`."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from cbtm_pipeline.config import Config
from cbtm_pipeline.plan_base import Plan


@dataclass(frozen=True)
class ClusterPlan(Plan):
    """Rule `fit_kmeans`. Unless `by` is text, labels of documents decide, too (clustering/labelled)."""

    k: int
    balance: Literal["documents", "tokens", "none"]
    fit_documents: int
    n_init: int
    max_iterations: int
    rng_seed: int
    by: Literal["text", "label", "label+text"] = "text"
    parents: int | None = None  # groups of clusters; they are numbered by group


@dataclass(frozen=True)
class AssignPlan(Plan):
    """Rule `assign`. `validation_share` of the held-out documents are grouped by cluster, too.

    `border_share` of each expert's tokens are of documents of other clusters (clustering/borders).
    """

    validation_share: float
    rng_seed: int
    border_share: float = dataclasses.field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class AssignRandomPlan(AssignPlan):
    """Rule `assign_random`."""

    k: int


@dataclass(frozen=True)
class ScoreTrainingPlan(Plan):
    """Rule `score_training`: the first `context` tokens of the documents that clusters are fitted on."""

    context: int
    fit_documents: int
    rng_seed: int


@dataclass(frozen=True)
class SecondRoundPlan(AssignPlan):
    """Rule `second_round`."""

    k: int
    balance: Literal["documents", "tokens", "none"]
    fit_documents: int


def fit_kmeans(c: Config) -> ClusterPlan:
    names = {field.name for field in dataclasses.fields(ClusterPlan)}
    return ClusterPlan(**c.cluster.model_dump(include=names), rng_seed=c.seed)


def assign(c: Config) -> AssignPlan:
    return AssignPlan(c.train.validation_share, c.seed, border_share=c.cluster.border_share)


def assign_random(c: Config) -> AssignRandomPlan:
    return AssignRandomPlan(c.train.validation_share, c.seed, c.cluster.k)


def score_training(c: Config) -> ScoreTrainingPlan:
    return ScoreTrainingPlan(c.train.seq_len, c.cluster.fit_documents, c.seed)


def second_round(c: Config) -> SecondRoundPlan:
    about = c.cluster.k, c.cluster.balance, c.cluster.fit_documents
    return SecondRoundPlan(c.train.validation_share, c.seed, *about)
