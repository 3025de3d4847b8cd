"""Clusters of clusters: k clusters in P groups of k / P, so that experts of a group can share a parent.

Balanced k-means on the centres. Each iteration assigns the centres to groups of equal size at the least sum
of load times squared distance (`transport`), and moves each group to the weighted mean of its centres. The
best of several runs counts.

Shapes: D dimensions, K clusters, P groups.
"""

import numpy as np

from cbtm_pipeline.clustering import lloyd, transport
from cbtm_pipeline.clustering.distances import squared_distances


def order(
    centres_KD: np.ndarray, loads_K: np.ndarray, n: int, *, rng_seed: int, n_init: int, max_iterations: int
) -> np.ndarray:
    """The order of the clusters in which those of a group follow each other: K / n clusters for each group.

    Groups stand in the order of their first clusters, and the clusters of a group in the order that they had.
    """
    weights_K = np.maximum(np.asarray(loads_K, np.float64), 1e-9 * np.max(loads_K))  # a cluster may be empty
    runs = [
        _run(centres_KD, weights_K, n, np.random.default_rng([rng_seed, number]), max_iterations)
        for number in range(n_init)
    ]
    groups_K, _ = min(runs, key=lambda run: run[1])
    first_K = np.array([np.argmax(groups_K == group) for group in groups_K])
    return np.argsort(first_K, kind="stable")


def _run(
    centres_KD: np.ndarray, weights_K: np.ndarray, n: int, rng: np.random.Generator, max_iterations: int
) -> tuple[np.ndarray, float]:
    """The group of each cluster, and what the groups cost. No iteration makes them cost more."""
    keys_K = rng.integers(1 << 64, size=len(centres_KD), dtype=np.uint64)
    means_PD = lloyd.seeds(centres_KD, weights_K, keys_K, n, rng)
    groups_K, cost, prices_P = np.empty(0), np.inf, np.zeros(n)
    for _ in range(max_iterations):
        costs_KP = weights_K[:, None] * squared_distances(centres_KD, means_PD)
        found_K, prices_P = transport.balance(costs_KP, np.ones(len(centres_KD)), prices_P)
        new = float(costs_KP[np.arange(len(found_K)), found_K].sum())
        if not new < cost:
            break
        groups_K, cost = found_K, new
        shares_PK = (groups_K == np.arange(n)[:, None]) * weights_K
        means_PD = (shares_PK / shares_PK.sum(axis=1, keepdims=True)) @ centres_KD.astype(np.float64)
        means_PD = means_PD.astype(np.float32)
    assert (np.bincount(groups_K, minlength=n) == len(groups_K) // n).all()
    return groups_K, cost
