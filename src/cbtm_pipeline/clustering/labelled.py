"""Clusters that follow the labels of documents (cluster.by): their rule, and the centres that routers need.

* `label`: a document belongs to the cluster of its label, as in Branch-Train-Merge (Li et al. 2022). With
  more labels than clusters, labels are dealt to clusters: the heaviest label that is left goes to the
  lightest cluster, so that clusters are about equally heavy.
* `label+text`: balanced k-means, in which the vector h of a document counts as (h + m) / 2, where m is the
  mean vector of its label. So documents of one label stay together where the text does not speak against it,
  labels that are alike share a cluster, and large ones are split.

A document without label goes by its text: to the nearest centre (`label`), or with m = h (`label+text`). The
centre of a cluster is always the mean vector of its documents. Routers know these centres alone and see no
label.

Shapes: N documents, D dimensions, K clusters, L labels, R documents of a chunk.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.clustering.distances import CHUNK_ROWS

MAX_LABELS = 10_000  # more values are no sources or domains
PULL = 0.5  # weight of the label's mean vector in `label+text`

Chunk = tuple[np.ndarray, np.ndarray, Sequence[str]]  # vectors (R, D), weights (R,), labels


def deal(weights: Mapping[str, float], k: int) -> dict[str, int]:
    """The cluster of each label, so that clusters are about equally heavy. `weights`: those of the labels.

    With k labels, each is a cluster, the heaviest first. Raises ValueError for fewer labels or too many.
    """
    check(len(weights), k)
    loads_K, groups = np.zeros(k), {}
    for label in sorted(weights, key=lambda name: (-weights[name], name)):
        groups[label] = int(loads_K.argmin())
        loads_K[groups[label]] += weights[label]
    return groups


def renumbered(groups: Mapping[str, int], order: Sequence[int]) -> dict[str, int]:
    """The cluster of each label, where the clusters are put into another order."""
    place = {j: new for new, j in enumerate(order)}
    return {label: place[j] for label, j in groups.items()}


def numbered(weights: Mapping[str, float]) -> dict[str, int]:
    """A number for each label. Raises ValueError for too many labels."""
    check(len(weights), 0)
    return {label: i for i, label in enumerate(sorted(weights))}


def check(n_labels: int, k: int) -> None:
    """Raise ValueError unless so many labels can be dealt to k clusters."""
    if n_labels > MAX_LABELS:
        raise ValueError(
            f"corpus.label_field: {n_labels} values. Expected at most {MAX_LABELS} to make clusters of. "
            "Name a field of sources or domains, or set cluster.by: text."
        )
    if n_labels < k:
        raise ValueError(
            f"cluster.k: {k}. Expected at most {n_labels}, the number of labels. Lower cluster.k, or set "
            "cluster.by: label+text."
        )


class Rule(NamedTuple):
    """How a document gets its cluster.

    `centres_KD` are the centres of routers. With `groups` (the cluster of each label), labels decide. With
    `means` (the mean vector of each label), `fit_centres_KD` and prices, such as `fit_prices_K`, decide in
    the space of `pulled`. With neither, `centres_KD` and the prices do, as in k-means.
    """

    centres_KD: np.ndarray
    groups: Mapping[str, int] | None = None
    means: Mapping[str, np.ndarray] | None = None
    fit_centres_KD: np.ndarray | None = None
    fit_prices_K: np.ndarray | None = None

    @property
    def priced_centres_KD(self) -> np.ndarray:
        """The centres that prices belong to."""
        return self.centres_KD if self.fit_centres_KD is None else self.fit_centres_KD

    def space(self, x_ND: np.ndarray, labels: Sequence[str] | None) -> np.ndarray:
        """The documents' vectors where prices decide."""
        return x_ND if self.means is None or labels is None else pulled(x_ND, labels, self.means)

    def assign(
        self, x_ND: np.ndarray, labels: Sequence[str] | None, prices_K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cluster (int32) of each document, and its squared distance to the centre of routers (float32)."""
        if self.groups is None and self.means is None:
            return kmeans.assign(x_ND, self.centres_KD, prices_K)
        d2_NK = kmeans.squared_distances(x_ND, self.centres_KD)
        if self.groups is None:
            labels_N, _ = kmeans.assign(self.space(x_ND, labels), self.priced_centres_KD, prices_K)
        else:
            labels_N = of_groups(labels or (), self.groups)
            labels_N = np.where(labels_N < 0, d2_NK.argmin(axis=1), labels_N).astype(np.int32)
        return labels_N, d2_NK[np.arange(len(x_ND)), labels_N]

    def costs(self, x_ND: np.ndarray, labels: Sequence[str] | None, prices_K: np.ndarray) -> np.ndarray:
        """What each cluster costs each document, (N, K): squared distance, plus price where prices decide."""
        d2_NK = kmeans.squared_distances(self.space(x_ND, labels), self.priced_centres_KD)
        return d2_NK if self.groups is not None else d2_NK + prices_K

    def settings(self, prices_K: np.ndarray) -> dict[str, Any]:
        """What the manifest of the assignments says instead of prices between the routers' centres."""
        none_K = [0.0] * len(prices_K)
        if self.groups is not None:
            return {"by": "label", "prices": "none", "prices_K": none_K}
        if self.means is not None:
            return {"by": "label+text", "prices_K": none_K, "fit_prices_K": prices_K.tolist()}
        return {}

    def stored(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays and the entry `labels` of the record that clusterer.npz has for this rule."""
        if self.means is None:
            return {}, {"groups": dict(self.groups or {})}
        assert self.fit_centres_KD is not None and self.fit_prices_K is not None
        means_LD = np.array(list(self.means.values()), np.float32)
        arrays = {"fit_centres_KD": self.fit_centres_KD, "fit_prices_K": self.fit_prices_K}
        return {**arrays, "label_means_LD": means_LD}, {"names": list(self.means)}


def read(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> Rule:
    """The rule of a clusterer, from its arrays and its record."""
    about = record.get("labels", {})
    if "groups" in about:
        return Rule(arrays["centres_KD"], groups=about["groups"])
    if "names" in about:
        of_labels = dict(zip(about["names"], arrays["label_means_LD"], strict=True))
        fitted = arrays["fit_centres_KD"], arrays["fit_prices_K"]
        return Rule(arrays["centres_KD"], None, of_labels, *fitted)
    return Rule(arrays["centres_KD"])


def of_groups(labels: Sequence[str], groups: Mapping[str, int]) -> np.ndarray:
    """The number of each document's label, -1 for a document without a label (int64)."""
    return np.array([groups.get(label, -1) for label in labels], np.int64)


def pulled(x_ND: np.ndarray, labels: Sequence[str], means: Mapping[str, np.ndarray]) -> np.ndarray:
    """(1 - PULL) h + PULL m for each vector h, where m is the mean of its label (float32). Others stay."""
    names = list(means)
    numbers_N = of_groups(labels, {name: i for i, name in enumerate(names)})
    table_LD = np.array([means[name] for name in names], np.float32).reshape(len(names), x_ND.shape[1])
    found_N, moved_ND = numbers_N >= 0, np.array(x_ND, np.float32)
    moved_ND[found_N] += np.float32(PULL) * (table_LD[numbers_N[found_N]] - moved_ND[found_N])
    return moved_ND


def means(chunks: Iterable[Chunk], groups: Mapping[str, int], n: int) -> np.ndarray:
    """The weighted mean vector of the documents of each of n groups of labels, (n, D) float32.

    One pass over the corpus. Sums are float64, in the order of the documents, whatever the number of threads.
    A group without documents has the zero vector.
    """
    sums_nD: np.ndarray | None = None
    total_n = np.zeros(n)
    for x_RD, weights_R, labels in chunks:
        sums_nD = np.zeros((n, x_RD.shape[1])) if sums_nD is None else sums_nD
        numbers_R = of_groups(labels, groups)
        for start in range(0, len(x_RD), CHUNK_ROWS):
            some = slice(start, start + CHUNK_ROWS)
            _add(sums_nD, total_n, np.asarray(x_RD[some]), weights_R[some], numbers_R[some])
    assert sums_nD is not None
    return (sums_nD / np.maximum(total_n, 1e-300)[:, None]).astype(np.float32)


def _add(
    sums_nD: np.ndarray, total_n: np.ndarray, x_RD: np.ndarray, weights_R: np.ndarray, numbers_R: np.ndarray
) -> None:
    """Add a chunk to the sums of its groups."""
    order = np.argsort(numbers_R, kind="stable")
    order = order[numbers_R[order] >= 0]
    if not len(order):
        return
    there, starts = np.unique(numbers_R[order], return_index=True)
    weighted_RD = x_RD[order].astype(np.float64) * weights_R[order, None]
    sums_nD[there] += np.add.reduceat(weighted_RD, starts, axis=0)
    total_n += np.bincount(numbers_R[order], weights_R[order], len(total_n))


def centres(x_ND: np.ndarray, weights_N: np.ndarray, labels_N: np.ndarray, k: int) -> np.ndarray:
    """The weighted mean vector of each cluster's documents, (K, D) float32."""
    numbers = {str(j): j for j in range(k)}
    return means([(x_ND, weights_N, [str(j) for j in labels_N.tolist()])], numbers, k)


def certified(rule: Rule, x_ND: np.ndarray, weights_N: np.ndarray, labels_N: np.ndarray) -> kmeans.Clustering:
    """The clustering of a sample by a rule with labels, with loads and inertia.

    Its prices are zero and it has no duality gap: labels, or other vectors, have decided.
    """
    k, total = len(rule.centres_KD), float(weights_N.sum())
    d2_NK = kmeans.squared_distances(x_ND, rule.centres_KD)
    loads_K = np.bincount(labels_N, weights_N, k)
    own_N = d2_NK[np.arange(len(x_ND)), labels_N].astype(np.float64)
    return kmeans.Clustering(
        rule.centres_KD,
        np.zeros(k),
        labels_N,
        loads_K,
        inertia=float((weights_N * own_N).sum()) / total,
        balance=float(loads_K.max() * k / total),
        min_balance=float(loads_K.min() * k / total),
        duality_gap=None,
        n_iterations=0,
    )
