"""First stages: models that experts begin as, in the place of the seed.

`cluster.parents`: the clusters form P groups of c = k / P clusters. A *parent* is trained on the documents of
a group, and the experts of these clusters begin as it. Clusters are numbered by group: parent p has p c to
p c + c - 1.

`cluster.second_round`: an expert `first-j` is trained on each cluster. Then each document goes to the one
that predicts it best, and expert j begins as `first-j`, on the documents that are its own now.

An expert without a first stage makes n steps of b sequences (plan.py). With one, it makes n - m steps, where
m = round(train.first_share * n), at least 1 and at most n - 1. The first stage makes the others:

    P parents            c * m steps with b sequences each
    k experts first-j        m steps with b sequences each

Together both stages read k n b sequences, as many as k experts without a first stage. A parent has the batch
of an expert and not one that is c times larger, because both have one learning rate.
"""

from cbtm_pipeline import plan_search
from cbtm_pipeline.config import Config

PARENT, FIRST = "parent-", "first-"  # ids of models of a first stage begin like this


def firsts(c: Config) -> list[str]:
    """Ids of the models of the first stage; none without one."""
    if c.cluster.second_round:
        return [f"{FIRST}{j}" for j in range(c.cluster.k)]
    return [f"{PARENT}{p}" for p in range(c.cluster.parents or 0)]


def is_first(training: str) -> bool:
    """Whether a training is of a first stage."""
    return training.startswith((PARENT, FIRST))


def n_children(c: Config) -> int:
    """How many experts begin as each parent."""
    return c.cluster.k // c.cluster.parents if c.cluster.parents else 1


def first_of(c: Config, training: str) -> str | None:
    """The model of the first stage that an expert or its candidate begins as; None without one."""
    expert = plan_search.base(training)
    if not expert.isdecimal():
        return None
    if c.cluster.second_round:
        return f"{FIRST}{expert}"
    return f"{PARENT}{int(expert) // n_children(c)}" if c.cluster.parents else None


def share_of(c: Config, n_steps: int) -> int:
    """How many of the n steps of an expert the first stage makes for it."""
    return min(max(1, round(c.train.first_share * n_steps)), n_steps - 1) if firsts(c) else 0
