"""Equally heavy clusters by prices: the transport problem of one balanced assignment, solved in its dual.

Giving every document to one of k equally heavy clusters at the least total squared distance is a transport problem. Its dual has
one number per cluster: with the right prices p_j, the rule  argmin_j d2_ij + p_j  is the optimal balanced assignment. The prices
are found in two stages: damped Newton steps on the dual, whose Hessian is the density of documents at each border between two
clusters (semi-discrete transport: Kitagawa, Merigot and Thibert 2019); then single documents move along shortest paths between
clusters, after which the assignment is still optimal for its own loads (successive shortest paths, on a graph of only k nodes).

Shapes: N documents, K clusters, R rows of one chunk or one cluster.
"""

from collections.abc import Iterator

import numpy as np

from cbtm_pipeline.clustering.distances import CACHED_ROWS

NEWTON_STEPS = 30
NEWTON_GOAL = 2e-3  # share of the mass in the wrong cluster that is left to the moves of single documents
NEWTON_STUCK = 2e-2  # above this share, prices found for a quarter of the documents are a better start


def balance(
    d2_NK: np.ndarray, mass_N: np.ndarray, prices_K: np.ndarray, exact: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and prices (mean zero) of the balanced assignment; `prices_K` is a first guess.

    With equal masses the loads differ by at most one document; unless `exact`, up to NEWTON_GOAL of the mass may be in the wrong
    cluster, and up to NEWTON_STUCK where documents lie in clumps. No cluster is empty if `exact` and no mass is above the mean load.
    The labels are argmin_j d2_ij + p_j, except where documents tie exactly: then the prices cannot tell them apart.
    """
    labels_N, prices_K, wrong = _newton(d2_NK, mass_N, prices_K)
    if wrong > NEWTON_STUCK and len(d2_NK) > 32 * len(prices_K):
        _, prices_K = balance(np.ascontiguousarray(d2_NK[::4]), mass_N[::4], prices_K)
        labels_N, prices_K, wrong = _newton(d2_NK, mass_N, prices_K)
    if not exact and wrong <= NEWTON_STUCK:
        return labels_N, prices_K - prices_K.mean()
    return _even_out(d2_NK, mass_N, labels_N, prices_K)


def _newton(
    d2_NK: np.ndarray, mass_N: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Labels, prices and the share of the mass in the wrong cluster after Newton steps that each lower this share.

    Raising p_a by a small h moves the documents of a whose margin to their second cluster b is below h. So the documents with
    margins below h, per pair (a, b) and divided by h, estimate the derivative of the loads: a graph Laplacian.
    """
    k, total = len(prices_K), mass_N.sum()

    def look(prices_K):
        first_N, second_N, margin_N = _two_nearest(d2_NK, prices_K)
        excess_K = np.bincount(first_N, mass_N, k) - total / k
        return first_N, second_N, margin_N, excess_K, float(np.abs(excess_K).sum() / 2 / total)

    first_N, second_N, margin_N, excess_K, wrong = look(prices_K)
    for _ in range(NEWTON_STEPS if k > 1 else 0):
        width = np.quantile(margin_N, min(1, max(4 * wrong, 8 * k / len(margin_N))))
        if wrong <= NEWTON_GOAL or width == 0:
            break
        near = margin_N <= width
        density_KK = np.bincount(first_N[near] * k + second_N[near], mass_N[near], k * k).reshape(k, k) / (
            2 * width
        )
        density_KK += density_KK.T
        laplacian_KK = (
            np.diag(density_KK.sum(axis=1) + 0.1 * density_KK.sum() / k) - density_KK
        )  # damped where few documents are near
        step_K = np.linalg.solve(laplacian_KK, excess_K)
        for damping in (1, 0.5, 0.25, 0.125, 0.0625):
            new = look(prices_K + damping * step_K)
            if new[-1] < wrong:
                break
        else:
            break
        prices_K = prices_K + damping * step_K
        first_N, second_N, margin_N, excess_K, wrong = new
    return first_N, prices_K, wrong


def _two_nearest(d2_NK: np.ndarray, prices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two clusters with the least d2 + p for each document, and the difference between the two."""
    first_N, second_N = np.empty((2, len(d2_NK)), dtype=np.int64)
    margin_N = np.empty(len(d2_NK))
    for start in range(0, len(d2_NK), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        cost_RK = d2_NK[rows] + prices_K
        each = np.arange(len(cost_RK))
        first_N[rows] = cost_RK.argmin(axis=1)
        lowest_R = cost_RK[each, first_N[rows]]
        cost_RK[each, first_N[rows]] = np.inf
        second_N[rows] = cost_RK.argmin(axis=1)
        margin_N[rows] = cost_RK[each, second_N[rows]] - lowest_R
    return first_N, second_N, margin_N


def _even_out(d2_NK, mass_N, labels_N, prices_K):
    """Move documents along shortest paths from heavy to light clusters until no such path evens the loads further.

    The edge a -> b costs the least d2_ib - d2_ia of the documents i in a. Less p_a - p_b this is never negative, so Dijkstra's
    algorithm applies, and its distances say how the prices follow. `labels_N` is changed in place.
    """
    k = len(prices_K)
    every_K, mean, least = np.arange(k), mass_N.sum() / k, mass_N.min()
    loads_K, counts_K = np.bincount(labels_N, mass_N, k), np.bincount(labels_N, minlength=k)
    cost_KK, mover_KK = np.full((k, k), np.inf), np.zeros((k, k), dtype=np.int64)

    def leave(a):
        rows = np.flatnonzero(labels_N == a)
        if len(rows) > 0:
            cost_RK = d2_NK[rows] - d2_NK[rows, a, None].astype(np.float64)
            cheapest_K = cost_RK.argmin(axis=0)
            cost_KK[a], mover_KK[a] = cost_RK[cheapest_K, every_K], rows[cheapest_K]

    def move(from_K, to_K):
        lengths_KK = np.maximum(cost_KK - prices_K[:, None] + prices_K, 0)
        for path, distance_K in _shortest_paths(lengths_KK, from_K & (counts_K > 1), to_K):
            documents = mover_KK[path[:-1], path[1:]]
            new_K = loads_K.copy()
            new_K[path[:-1]] -= mass_N[documents]
            new_K[path[1:]] += mass_N[documents]
            evener = np.square(new_K - mean).sum() < np.square(loads_K - mean).sum() * (1 - 1e-12)
            if evener or counts_K[path[-1]] == 0:
                return path, documents, new_K, np.minimum(distance_K, distance_K[path[-1]])
        return None

    for a in range(k):
        leave(a)
    while loads_K.max() - loads_K.min() > least:
        found = (
            move(loads_K >= mean + least / 2, loads_K <= mean - least / 2)
            or move(every_K == loads_K.argmax(), loads_K < loads_K.max())
            or move(loads_K > loads_K.min(), every_K == loads_K.argmin())
        )
        if found is None:
            break
        path, documents, loads_K, distance_K = found
        prices_K = prices_K - distance_K
        labels_N[documents] = path[1:]
        counts_K[path[0]] -= 1
        counts_K[path[-1]] += 1
        for a in path:
            leave(a)
    return labels_N, _inner_prices(cost_KK, prices_K)


def _shortest_paths(
    lengths_KK: np.ndarray, from_K: np.ndarray, to_K: np.ndarray
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Dijkstra's algorithm: the shortest path from any of `from_K` to each of `to_K`, nearest first, and all distances so far."""
    distance_K = np.where(from_K, 0, np.inf)
    open_K = distance_K.copy()
    previous_K = np.full(len(from_K), -1)
    while open_K[a := int(open_K.argmin())] < np.inf:
        open_K[a] = np.inf
        if to_K[a]:
            path = [a]
            while previous_K[path[0]] >= 0:
                path.insert(0, int(previous_K[path[0]]))
            yield path, distance_K
        through_K = distance_K[a] + lengths_KK[a]
        shorter_K = through_K < distance_K
        np.copyto(distance_K, through_K, where=shorter_K)
        np.copyto(open_K, through_K, where=shorter_K)
        previous_K[shorter_K] = a


def _inner_prices(cost_KK: np.ndarray, prices_K: np.ndarray) -> np.ndarray:
    """Prices inside the set {p: p_a - p_b <= cost_ab} of all prices that give the same assignment, where ties are broken.

    Its extreme points include the columns and the negative rows of the matrix of shortest distances (Floyd and Warshall); their
    mean meets a constraint with equality only if every point of the set does.
    """
    distance_KK = np.maximum(cost_KK - prices_K[:, None] + prices_K, 0)
    np.fill_diagonal(distance_KK, 0)
    for a in range(len(prices_K)):
        np.minimum(distance_KK, distance_KK[:, [a]] + distance_KK[a], out=distance_KK)
    prices_K = prices_K + (distance_KK.mean(axis=1) - distance_KK.mean(axis=0)) / 2
    return prices_K - prices_K.mean()
