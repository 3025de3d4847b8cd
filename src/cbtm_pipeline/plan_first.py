"""First stages: models that experts begin as, in the place of the seed (`cluster.parents`).

The clusters form P groups of c = k / P clusters. A *parent* is trained on the documents of a group, and the
experts of these clusters begin as it. Clusters are numbered by group: parent p has p c to p c + c - 1.

An expert without a parent makes n steps of b sequences (plan.py). With one, m = round(train.first_share * n)
of these steps, at least 1 and at most n - 1, are its share of the parent:

    P parents    c * m steps with b sequences each
    k experts    n - m steps with b sequences each

Together they read P c m b + k (n - m) b = k n b sequences, as many as k experts without parents. A parent has
the batch of an expert and not one that is c times larger, because both have one learning rate.
"""

from cbtm_pipeline import plan_search
from cbtm_pipeline.config import Config

PARENT = "parent-"  # ids of parents begin like this


def parents(c: Config) -> list[str]:
    """Ids of the parents; none without cluster.parents."""
    return [f"{PARENT}{p}" for p in range(c.cluster.parents or 0)]


def is_parent(training: str) -> bool:
    return training.startswith(PARENT)


def n_children(c: Config) -> int:
    """How many experts begin as each parent."""
    assert c.cluster.parents
    return c.cluster.k // c.cluster.parents


def parent_of(c: Config, training: str) -> str | None:
    """The parent that an expert or its candidate begins as; None without one."""
    expert = plan_search.base(training)
    return f"{PARENT}{int(expert) // n_children(c)}" if c.cluster.parents and expert.isdecimal() else None


def share_of(c: Config, n_steps: int) -> int:
    """How many of the n steps of an expert its parent makes for it."""
    return min(max(1, round(c.train.first_share * n_steps)), n_steps - 1) if c.cluster.parents else 0
