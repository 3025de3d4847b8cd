"""Equally heavy clusters by prices: the transport problem of one balanced assignment, solved in its dual.

To give every document to one of k equally heavy clusters at the least total squared distance is a transport
problem. Its dual has one number per cluster: with the right prices p_j, the rule  argmin_j d2_ij + p_j  is
the optimal balanced assignment. The prices are found in two stages. First, damped Newton steps climb the
dual, whose Hessian is the density of documents at each border between two clusters (semi-discrete transport:
Kitagawa, Merigot and Thibert 2019). Then single documents move along shortest paths between clusters, after
which the assignment is still optimal for its own loads (successive shortest paths, on a graph of only k
nodes).

Shapes: N documents, K clusters, R rows of one chunk or one cluster.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.clustering.distances import CACHED_ROWS, solve

NEWTON_STEPS = 30
NEWTON_GOAL = 2e-3  # share of the mass in the wrong cluster that is left to the moves of single documents
NEWTON_STUCK = 2e-2  # above this share, prices found for a quarter of the documents are a better start
DAMPINGS = (1, 0.5, 0.25, 0.125, 0.0625)  # parts of a Newton step that are tried, in this order


def balance(
    d2_NK: np.ndarray, mass_N: np.ndarray, prices_K: np.ndarray, exact: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and prices (mean zero) of the balanced assignment. `prices_K` is a first guess.

    With equal masses, the loads differ by at most one document. Unless `exact`, up to NEWTON_GOAL of the mass
    may be in the wrong cluster, and up to NEWTON_STUCK where documents lie in clumps. No cluster is empty if
    `exact` and no mass is above the mean load. The labels are argmin_j d2_ij + p_j, except where documents
    tie exactly: prices cannot separate those.
    """
    labels_N, prices_K, wrong = _newton(d2_NK, mass_N, prices_K)
    if wrong > NEWTON_STUCK and len(d2_NK) > 32 * len(prices_K):
        _, prices_K = balance(np.ascontiguousarray(d2_NK[::4]), mass_N[::4], prices_K)
        labels_N, prices_K, wrong = _newton(d2_NK, mass_N, prices_K)
    if not exact and wrong <= NEWTON_STUCK:
        return labels_N, prices_K - prices_K.mean()
    return _even_out(d2_NK, mass_N, labels_N, prices_K)


class Assigned(NamedTuple):
    """The assignment by given prices: each document's two cheapest clusters, and the difference `margin_N`.

    `excess_K` is the load of each cluster above the mean load. `wrong` is the share of the mass in the wrong
    cluster.
    """

    first_N: np.ndarray
    second_N: np.ndarray
    margin_N: np.ndarray
    excess_K: np.ndarray
    wrong: float


def _assign(d2_NK: np.ndarray, mass_N: np.ndarray, prices_K: np.ndarray) -> Assigned:
    """The assignment by `prices_K`."""
    k, total = len(prices_K), mass_N.sum()
    first_N, second_N, margin_N = _two_nearest(d2_NK, prices_K)
    excess_K = np.bincount(first_N, mass_N, k) - total / k
    return Assigned(first_N, second_N, margin_N, excess_K, float(np.abs(excess_K).sum() / 2 / total))


def _newton(
    d2_NK: np.ndarray, mass_N: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Labels, prices and the share of the mass in the wrong cluster. Each Newton step lowers this share."""
    k = len(prices_K)
    at = _assign(d2_NK, mass_N, prices_K)
    for _ in range(NEWTON_STEPS if k > 1 else 0):
        width = np.quantile(at.margin_N, min(1, max(4 * at.wrong, 8 * k / len(at.margin_N))))
        if at.wrong <= NEWTON_GOAL or width == 0:
            break
        step_K = solve(_laplacian(at, mass_N, width), at.excess_K)
        for damping in DAMPINGS:
            new = _assign(d2_NK, mass_N, prices_K + damping * step_K)
            if new.wrong < at.wrong:
                break
        else:
            break
        prices_K, at = prices_K + damping * step_K, new
    return at.first_N, prices_K, at.wrong


def _laplacian(at: Assigned, mass_N: np.ndarray, width: float) -> np.ndarray:
    """An estimate of the derivative of the loads by the prices, (K, K): a graph Laplacian.

    If p_a rises by a small h, documents of cluster a move to their second cluster b: those whose margin is
    below h. So the documents with margins up to `width`, per pair (a, b) and divided by `width`, estimate the
    derivative.
    """
    k, near_N = len(at.excess_K), at.margin_N <= width
    pairs = at.first_N[near_N] * k + at.second_N[near_N]
    density_KK = np.bincount(pairs, mass_N[near_N], k * k).reshape(k, k) / (2 * width)
    density_KK += density_KK.T
    # more on the diagonal damps the steps of clusters with few documents near a border
    return np.diag(density_KK.sum(axis=1) + 0.1 * density_KK.sum() / k) - density_KK


def _two_nearest(d2_NK: np.ndarray, prices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two clusters with the least d2 + p for each document, and the difference between the two."""
    first_N, second_N = np.empty((2, len(d2_NK)), dtype=np.int64)
    margin_N = np.empty(len(d2_NK))
    for start in range(0, len(d2_NK), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        cost_RK = d2_NK[rows] + prices_K
        every_R = np.arange(len(cost_RK))
        first_N[rows] = cost_RK.argmin(axis=1)
        lowest_R = cost_RK[every_R, first_N[rows]]
        cost_RK[every_R, first_N[rows]] = np.inf
        second_N[rows] = cost_RK.argmin(axis=1)
        margin_N[rows] = cost_RK[every_R, second_N[rows]] - lowest_R
    return first_N, second_N, margin_N


def _even_out(
    d2_NK: np.ndarray, mass_N: np.ndarray, labels_N: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and prices after documents have moved from heavy to light clusters along shortest paths.

    It ends when no such path evens the loads further. Changes `labels_N` in place.
    """
    clusters = _Clusters(d2_NK, mass_N, labels_N, prices_K)
    mean, least = mass_N.sum() / len(prices_K), mass_N.min()
    every_K = np.arange(len(prices_K))
    while np.ptp(clusters.loads_K) > least:
        loads_K = clusters.loads_K
        exchange = (
            clusters.exchange(loads_K >= mean + least / 2, loads_K <= mean - least / 2)
            or clusters.exchange(every_K == loads_K.argmax(), loads_K < loads_K.max())
            or clusters.exchange(loads_K > loads_K.min(), every_K == loads_K.argmin())
        )
        if exchange is None:
            break
        clusters.apply(exchange)
    return labels_N, _inner_prices(clusters.cost_KK, clusters.prices_K)


class Exchange(NamedTuple):
    """Document i of `documents` moves from cluster path[i] to path[i + 1].

    The prices less `distance_K` fit the new assignment.
    """

    path: list[int]
    documents: np.ndarray
    loads_K: np.ndarray  # afterwards
    distance_K: np.ndarray


class _Clusters:
    """Clusters as the nodes of a graph whose edges are the cheapest moves of a document.

    The edge a -> b costs the least d2_ib - d2_ia of the documents i in a. Less p_a - p_b, this is never
    negative. So Dijkstra's algorithm applies, and its distances correct the prices.
    """

    def __init__(self, d2_NK: np.ndarray, mass_N: np.ndarray, labels_N: np.ndarray, prices_K: np.ndarray):
        k = len(prices_K)
        self.d2_NK, self.mass_N, self.labels_N, self.prices_K = d2_NK, mass_N, labels_N, prices_K
        self.mean = mass_N.sum() / k
        self.loads_K, self.counts_K = np.bincount(labels_N, mass_N, k), np.bincount(labels_N, minlength=k)
        self.cost_KK, self.mover_KK = np.full((k, k), np.inf), np.zeros((k, k), dtype=np.int64)
        for a in range(k):
            self._find_movers(a)

    def _find_movers(self, a: int) -> None:
        """Find the document of cluster a that is the cheapest to move to each other cluster."""
        rows = np.flatnonzero(self.labels_N == a)
        if len(rows) > 0:
            cost_RK = self.d2_NK[rows] - self.d2_NK[rows, a, None].astype(np.float64)
            cheapest_K = cost_RK.argmin(axis=0)
            every_K = np.arange(len(self.prices_K))
            self.cost_KK[a], self.mover_KK[a] = cost_RK[cheapest_K, every_K], rows[cheapest_K]

    def exchange(self, from_K: np.ndarray, to_K: np.ndarray) -> Exchange | None:
        """The shortest path from `from_K` to `to_K` that evens the loads or fills an empty cluster."""
        lengths_KK = np.maximum(self.cost_KK - self.prices_K[:, None] + self.prices_K, 0)
        for path, distance_K in _shortest_paths(lengths_KK, from_K & (self.counts_K > 1), to_K):
            documents = self.mover_KK[path[:-1], path[1:]]
            new_K = self.loads_K.copy()
            new_K[path[:-1]] -= self.mass_N[documents]
            new_K[path[1:]] += self.mass_N[documents]
            before, after = np.square(self.loads_K - self.mean).sum(), np.square(new_K - self.mean).sum()
            if after < before * (1 - 1e-12) or self.counts_K[path[-1]] == 0:
                return Exchange(path, documents, new_K, np.minimum(distance_K, distance_K[path[-1]]))
        return None

    def apply(self, exchange: Exchange) -> None:
        """Move the documents, and let the prices follow."""
        path = exchange.path
        self.loads_K, self.prices_K = exchange.loads_K, self.prices_K - exchange.distance_K
        self.labels_N[exchange.documents] = path[1:]
        self.counts_K[path[0]] -= 1
        self.counts_K[path[-1]] += 1
        for a in path:
            self._find_movers(a)


def _shortest_paths(
    lengths_KK: np.ndarray, from_K: np.ndarray, to_K: np.ndarray
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Dijkstra's algorithm: the shortest path from any of `from_K` to each of `to_K`, the shortest first.

    With each path, it yields the distances to all clusters that are known so far.
    """
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
    """Prices inside the set {p: p_a - p_b <= cost_ab} of all prices that give the same assignment.

    Inside the set, ties are broken. The extreme points of this set include the columns and the negative rows
    of the matrix of shortest distances (Floyd and Warshall). Their mean meets a constraint with equality only
    if every point of the set does.
    """
    distance_KK = np.maximum(cost_KK - prices_K[:, None] + prices_K, 0)
    np.fill_diagonal(distance_KK, 0)
    for a in range(len(prices_K)):
        np.minimum(distance_KK, distance_KK[:, [a]] + distance_KK[a], out=distance_KK)
    prices_K = prices_K + (distance_KK.mean(axis=1) - distance_KK.mean(axis=0)) / 2
    return prices_K - prices_K.mean()
