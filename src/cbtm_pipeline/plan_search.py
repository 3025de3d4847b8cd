"""The search for learning rates: `train.lr` is a list. Which trainings are candidates, and of what.

A *kind* is what shares a rate: `seed`, `parents` or `first` (all of a first stage), `experts` (all on
clusters), `random` (all on random clusters), and each dense model. Every model of a kind is trained with
every rate. Such a training is a *candidate*, with the id `0@0.004`: expert 0 with the rate 0.004. Of each
kind, the rate with the lowest validation loss is chosen. Batches do not depend on the rate.
"""

from dataclasses import dataclass

from cbtm_pipeline.config import Config
from cbtm_pipeline.plan_base import Plan

MARK = "@"  # between an expert's id and a rate
KINDS = {
    "random": "random",
    "parent": "parents",
    "first": "first",
}  # kinds of models that have a number, by their names


@dataclass(frozen=True)
class ChoosePlan(Plan):
    """Rule `choose`: the rates of which one is chosen."""

    rates: tuple[float, ...]


def base(training: str) -> str:
    """The id of the expert that a training is of: `0` for `0@0.004` and for `0`."""
    return training.partition(MARK)[0]


def rates(c: Config) -> tuple[float, ...]:
    """The learning rates that are tried, in ascending order; none where train.lr is a number."""
    return tuple(sorted(c.train.lr)) if isinstance(c.train.lr, list) else ()


def rate(c: Config, training: str) -> float:
    """The learning rate of a training; of an expert whose rate is searched, the first one."""
    _, mark, value = training.partition(MARK)
    if mark:
        return float(value)
    return min(c.train.lr) if isinstance(c.train.lr, list) else c.train.lr


def seed_steps(c: Config) -> int:
    """Steps of the seed: seed_share of the compute of seed and experts together; 0 if it is pretrained."""
    t = c.train
    total = t.steps * t.batch_size  # sequences of all experts
    sequences = t.seed_share / (1 - t.seed_share) * total if c.model.pretrained is None else 0
    return round(sequences / t.seed_batch_size)


def is_searched(c: Config, expert: str) -> bool:
    """Whether the rate of an expert is searched. A seed that is not trained needs none."""
    return bool(rates(c)) and (expert != "seed" or seed_steps(c) > 0)


def candidates(c: Config, expert: str) -> list[str]:
    """Ids of the candidates of an expert, by ascending rate; none if its rate is not searched."""
    return [candidate(expert, value) for value in rates(c)] if is_searched(c, expert) else []


def candidate(expert: str, value: float) -> str:
    """The id of the training of an expert with a rate."""
    return f"{expert}{MARK}{value!r}"


def kind(training: str) -> str:
    """The kind that an expert or a candidate belongs to."""
    expert = base(training)
    if expert.isdecimal():
        return "experts"
    name, _, number = expert.partition("-")
    return KINDS.get(name, expert) if number.isdecimal() else expert


def choose(c: Config) -> ChoosePlan:
    return ChoosePlan(rates(c))
