"""The labels of documents: the value of a metadata field, such as a source or a domain (corpus.label_field).

A document without one has the empty label "". It counts in no measure of agreement.

Shapes: K clusters, L labels.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.printable import shortened
from cbtm_pipeline.corpus import shard_files

SHOWN = 40  # labels in tables, at most
TOP = 3  # labels that stand for a cluster
NONE = "(none)"  # how people are shown the empty label
_WIDTH = 24  # characters of a label in the table of clusters
_MAX_NAME = 100  # characters of a field that a message shows


def check_found(shards: Sequence[shard_files.Entry], field: str) -> None:
    """Raise ValueError if no document has a label. `field` is corpus.label_field."""
    n, n_labelled = (sum(entry[key] for entry in shards) for key in ("n_documents", shard_files.N_LABELLED))
    if not n_labelled:
        raise ValueError(missing(field))
    cli.log.info("%d of %d documents have a label", n_labelled, n)


def missing(field: str) -> str:
    """What to say where no row has the field of the labels."""
    return (
        f"corpus.label_field: {shortened(field, _MAX_NAME)}: no document has it. Expected a field of the "
        "rows. Correct it, or set it to null."
    )


class Crossed:
    """How many documents of each label each cluster has: a table that grows, shard by shard."""

    def __init__(self, k: int):
        self.counts: list[Counter[str]] = [Counter() for _ in range(k)]

    def add(self, labels: Iterable[str], clusters_N: np.ndarray) -> None:
        """Count some documents."""
        for (label, cluster), n in Counter(zip(labels, clusters_N.tolist(), strict=True)).items():
            self.counts[cluster][label] += n

    def content(self) -> dict[str, Any]:
        """The table for a manifest: of the SHOWN most frequent labels, and the agreement of all labels."""
        total: Counter[str] = sum(self.counts, Counter())
        names = most_frequent(total)
        table_KL = [[counts[name] for name in names[:SHOWN]] for counts in self.counts]
        about = {"names": names[:SHOWN], "n_labels": len(set(total) - {""}), "n_documents": table_KL}
        return {**about, **self.agreement()}

    def agreement(self) -> dict[str, float | None]:
        """Purity and NMI of the clusters against the labels of all documents that have one."""
        names = sorted(set().union(*self.counts) - {""})
        return agreement(np.array([[counts[name] for name in names] for counts in self.counts]))


def most_frequent(counts: Counter[str]) -> list[str]:
    """The labels, the most frequent first; of equals, in the order of their names."""
    return sorted(counts, key=lambda name: (-counts[name], name))


def agreement(table_KL: np.ndarray) -> dict[str, float | None]:
    """Purity and normalised mutual information of clusters and labels, from a table of documents (K, L).

    The purity is the share of the documents whose label is the most frequent one of their cluster. The NMI is
    the mutual information over the mean of both entropies; 1 where there is one cluster and one label. Both
    are None without documents.
    """
    from sklearn.metrics import mutual_info_score  # takes a second, and only labelled corpora need it

    n = table_KL.sum()
    if not n:
        return {"purity": None, "nmi": None}
    entropies = [_entropy(table_KL.sum(axis=axis) / n) for axis in (0, 1)]
    shared = float(mutual_info_score(None, None, contingency=table_KL))
    mean = sum(entropies) / 2
    return {"purity": float(table_KL.max(axis=1).sum() / n), "nmi": min(1.0, shared / mean) if mean else 1.0}


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def top(names: Sequence[str], counts: Sequence[int], n: int) -> dict[str, float]:
    """The most frequent labels of a cluster of n documents, with their shares."""
    order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
    return {names[i]: counts[i] / n for i in order[:TOP] if counts[i]}


def shown(shares: Mapping[str, float]) -> str:
    """Labels with their shares for people: `news 71 %, mail 20 %`."""
    return ", ".join(
        f"{name if len(name) <= _WIDTH else f'{name[: _WIDTH - 1]}…'} {100 * share:.0f} %"
        for name, share in ((name or NONE, share) for name, share in shares.items())
    )
