"""The plan of an expert that is added to a finished run (`cbtm add-expert`)."""

import dataclasses
from dataclasses import dataclass

from cbtm_pipeline import plan
from cbtm_pipeline.config import Config


@dataclass(frozen=True)
class AddedPlan(plan.TrainingPlan):
    """The training of an added expert. It begins as an expert, and reads a whole corpus."""

    branch: str | None = None


def train_expert(c: Config, expert: str) -> AddedPlan:
    """The plan of a cluster expert, for an expert on the whole corpus of a config."""
    like = dataclasses.asdict(plan.train_expert(c, "0"))
    return AddedPlan(**{**like, "expert": expert, "data": "corpus", "group": 0, "branch": "nearest"})
