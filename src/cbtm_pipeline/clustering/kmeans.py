"""Balanced k-means: a power diagram whose prices make the clusters equally heavy.

These are Lloyd's iterations (`lloyd`) in which each assignment is the balanced one of `transport`. That
assignment is argmin_j d2_ij + p_j  with one price per cluster. So centres and prices together also balance
documents that were never fitted, in one streaming pass.

Every random choice goes by the documents' row numbers, never by their vectors. So vectors that differ by
rounding give the same clusters, but for the documents at their borders. Clusters are numbered in the order of
their first documents.

Shapes: N documents, D dimensions, K clusters, R rows of one chunk, U distinct vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.clustering import lloyd
from cbtm_pipeline.clustering.distances import (
    CHUNK_ROWS,
    assign,
    check_vectors,
    directions_to_centres,
    gather,
    squared_distances,
    weighted_sum,
)

__all__ = [
    "Clustering",
    "assign",
    "directions_to_centres",
    "duality_gap",
    "fit",
    "renumbered",
    "squared_distances",
]

SAMPLE_ROWS, SAMPLE_PER_CLUSTER = (
    8192,
    128,
)  # documents that suffice for good seeds: the larger of both numbers
EVEN_ENOUGH = 1.01  # a run whose largest load is at most this times that of the most even run

Progress = Callable[[int, int, float, float], None]  # called with (run, iteration, inertia, balance)


@dataclass(frozen=True)
class Clustering:
    """Centres, prices, and the certificate of their assignment, all from `assign` on the fitted vectors.

    `loads_K` sums the weights per cluster. `balance` and `min_balance` are the largest and the smallest load
    over the mean load. `inertia` is the weighted mean of the squared distance to the own centre.
    `duality_gap` is (primal - dual) / primal of the transport problem at these centres: an assignment whose
    loads all lie between the smallest and the largest load found here lowers the inertia by at most this
    share, even if it splits documents.
    """

    centres_KD: np.ndarray  # float32
    prices_K: np.ndarray  # float64, mean zero; all zero without balance
    labels_N: np.ndarray  # int32
    loads_K: np.ndarray  # float64
    inertia: float
    balance: float
    min_balance: float
    duality_gap: float | None  # None where other things than distances and prices have decided
    n_iterations: int


class Sample(NamedTuple):
    """Distinct vectors of some documents, what their copies weigh together, and random numbers to draw by."""

    x_SD: np.ndarray
    mass_S: np.ndarray
    keys_S: np.ndarray


class Shuffled(NamedTuple):
    """The documents in random order, and their distinct vectors, numbered as they appear in this order.

    No prices separate identical vectors, so they are clustered as one vector with the weight of all.
    """

    x_ND: np.ndarray
    weights_N: np.ndarray
    rows_N: np.ndarray  # the random order
    vector_N: np.ndarray  # number of the vector of each of rows_N
    first_U: np.ndarray  # row of each distinct vector
    keys_U: np.ndarray  # a random number for each distinct vector
    k: int

    def shares(self) -> list[int]:
        """Shares of the samples, from the smallest sample to all documents; a share n is one n-th of them."""
        enough, shares = 2 * max(SAMPLE_ROWS, SAMPLE_PER_CLUSTER * self.k), [1]
        while len(self.first_U) > shares[0] * enough:
            shares.insert(0, 4 * shares[0])
        return shares

    def sample(self, share: int) -> Sample:
        """The distinct vectors of the first documents, one `share`-th of all."""
        n = -(-len(self.rows_N) // share)
        mass_S = np.bincount(self.vector_N[:n], self.weights_N[self.rows_N[:n]])
        n_vectors = len(mass_S)
        x_SD = gather(self.x_ND, self.first_U[:n_vectors])
        return Sample(x_SD, lloyd.at_most_a_share(mass_S, self.k), self.keys_U[:n_vectors])


def fit(
    x_ND: np.ndarray,
    k: int,
    *,
    weights_N: np.ndarray | None = None,
    balanced: bool = True,
    rng_seed: int,
    n_init: int,
    max_iterations: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Clustering:
    """The best of `n_init` runs of Lloyd's k-means from k-means++ seeds. No cluster is empty.

    Clusters are numbered in the order of their first documents.

    Clusters have equal loads if `balanced`; else each document goes to the nearest centre. `weights_N`
    (positive; None: ones) weigh the documents in the loads, the centres and the inertia. A document, or a set
    of identical ones, that is heavier than a fair share counts as one fair share while fitting: it fills a
    cluster, and the others share the rest evenly.

    The runs cluster a sample if there are many documents. The best run continues in samples that are each
    four times as large, and at last in all documents. It is the run of least inertia among those about as
    even as the most even one. `n_iterations` counts the last passes, those over all documents. `progress(run,
    iteration, inertia, balance)` is called after each iteration. Vectors whose distances are too many to hold
    (lloyd.DISTANCES) are copied to `device`, a name that torch knows.

    Raises ValueError if k is not in 1 ... number of distinct vectors, for vectors that are not finite and for
    weights that are not positive.
    """
    assert n_init >= 1 and max_iterations >= 1
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    weights_N = np.ones(len(x_ND)) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    _check(x_ND, k, weights_N)
    documents = _shuffled(x_ND, weights_N, k, rng_seed)
    settings = lloyd.Settings(balanced, max_iterations, device)
    smallest, *larger = documents.shares()
    number, state = _best_run(documents, smallest, settings, n_init, rng_seed, progress)
    report = _report_of(number, progress)
    for share in larger:
        x_SD, mass_S, _ = documents.sample(share)
        state = lloyd.run(x_SD, mass_S, state, settings, report, is_sample=share > 1)
    return _certify(x_ND, weights_N, _numbered(x_ND, state))


def _best_run(
    documents: Shuffled,
    share: int,
    settings: lloyd.Settings,
    n_init: int,
    rng_seed: int,
    progress: Progress | None,
) -> tuple[int, lloyd.State]:
    """The number and the result of the best of `n_init` runs on one `share`-th of the documents."""
    k = documents.k
    x_SD, mass_S, keys_S = documents.sample(share)
    runs: list[tuple[int, lloyd.State, Clustering]] = []
    for number in range(n_init):
        seeds_KD = lloyd.seeds(x_SD, mass_S, keys_S, k, np.random.default_rng([rng_seed, number]))
        start, report = lloyd.State(seeds_KD, np.zeros(k)), _report_of(number, progress)
        state = lloyd.run(x_SD, mass_S, start, settings, report, is_sample=share > 1)
        runs.append((number, state, _certify(x_SD, mass_S, state)))
    least = min(clustering.balance for *_, clustering in runs)
    limit = EVEN_ENOUGH * least if settings.balanced else np.inf
    number, state, _ = min((run for run in runs if run[-1].balance <= limit), key=lambda run: run[-1].inertia)
    return number, state


def _report_of(number: int, progress: Progress | None) -> lloyd.Report:
    """The report function of run `number`."""

    def report(iteration: int, inertia: float, balance: float) -> None:
        if progress is not None:
            progress(number, iteration, inertia, balance)

    return report


def _check(x_ND: np.ndarray, k: int, weights_N: np.ndarray) -> None:
    """Raise ValueError for what `fit` does not take."""
    assert x_ND.ndim == 2 and weights_N.shape == x_ND.shape[:1]
    if k < 1:
        raise ValueError(f"cluster.k: {k}. Expected at least 1. Raise cluster.k.")
    if k > len(x_ND):
        raise ValueError(
            f"cluster.k: {k}. Expected at most {len(x_ND)}, the number of documents. "
            "Lower cluster.k or add documents."
        )
    for start in range(0, len(x_ND), CHUNK_ROWS):
        check_vectors(x_ND[start : start + CHUNK_ROWS], start)
    good_N = (weights_N > 0) & (weights_N < np.inf)
    if not good_N.all():
        row = good_N.argmin()
        raise ValueError(
            f"weights: {weights_N[row]:g} in row {row}. Expected positive numbers. "
            "Drop documents without tokens."
        )


def _shuffled(x_ND: np.ndarray, weights_N: np.ndarray, k: int, rng_seed: int) -> Shuffled:
    """The documents in an order that depends on their number and the seed alone, never on their vectors.

    Vectors are compared by a hash of 64 bits. If two different vectors had the same hash, one would only lend
    its weight to the other while fitting.
    """
    factors_2D = np.random.default_rng(0).integers(1 << 63, size=(2, x_ND.shape[1]), dtype=np.uint64) * 2 + 1
    hash_N = np.empty(len(x_ND), np.uint64)
    for start in range(0, len(x_ND), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        bits_RD = (x_ND[rows] + np.float32(0)).view(np.uint32)  # adding 0 turns -0 into 0
        words_RD = bits_RD * factors_2D[0]
        hash_N[rows] = ((words_RD ^ words_RD >> np.uint64(29)) * factors_2D[1]).sum(axis=1)
    # the last number sets this stream apart from those of the runs
    keys_N = np.random.default_rng([rng_seed, 0, 1]).integers(1 << 64, size=len(x_ND), dtype=np.uint64)
    rows_N = np.argsort(keys_N)
    _, place_U, hash_number_N = np.unique(hash_N[rows_N], return_index=True, return_inverse=True)
    order_U = np.argsort(place_U)  # of appearance, where np.unique has that of the hashes
    number_U = np.empty_like(order_U)
    number_U[order_U] = np.arange(len(order_U))
    first_U = rows_N[place_U[order_U]]
    return Shuffled(x_ND, weights_N, rows_N, number_U[hash_number_N], first_U, keys_N[first_U], k)


def _numbered(x_ND: np.ndarray, state: lloyd.State) -> lloyd.State:
    """The clusters in the order of their first documents.

    Documents that tie exactly belong to the lowest of their clusters, so some may move with a new order. The
    order is taken again until it stays: each time, one more cluster at least is final. A cluster of nothing
    but ties could become empty. Then the order stays as it is.
    """
    k, order = len(state.prices_K), _order_of_appearance(x_ND, state)
    for _ in range(k):
        if len(order) < k or (order == np.arange(k)).all():
            break
        ordered = state._replace(centres_KD=state.centres_KD[order], prices_K=state.prices_K[order])
        order = _order_of_appearance(x_ND, ordered)
        state = ordered if len(order) == k else state
    return state


def renumbered(
    x_ND: np.ndarray, weights_N: np.ndarray | None, found: Clustering, order: np.ndarray
) -> Clustering:
    """The clustering of these vectors with its clusters in another order, and its certificate taken anew.

    Documents that tie exactly may move: they belong to the lowest of their clusters.
    """
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    weights_N = np.ones(len(x_ND)) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    state = lloyd.State(found.centres_KD[order], found.prices_K[order], found.n_iterations)
    return _certify(x_ND, weights_N, state)


def _order_of_appearance(x_ND: np.ndarray, state: lloyd.State) -> np.ndarray:
    """The clusters in the order of their first documents, as far as they have any."""
    seen = np.empty(0, np.int32)
    for start in range(0, len(x_ND), CHUNK_ROWS):
        labels_R, _ = assign(x_ND[start : start + CHUNK_ROWS], state.centres_KD, state.prices_K)
        labels_R = np.concatenate([seen, labels_R])
        seen = labels_R[np.sort(np.unique(labels_R, return_index=True)[1])]
        if len(seen) == len(state.prices_K):
            break
    return seen


def _certify(x_ND: np.ndarray, weights_N: np.ndarray, state: lloyd.State) -> Clustering:
    """The clustering of these vectors by centres and prices, with its certificate."""
    centres_KD, prices_K, n_iterations = state
    k, total = len(prices_K), float(weights_N.sum())
    labels_N, d2_N = assign(x_ND, centres_KD, prices_K)
    loads_K = np.bincount(labels_N, weights_N, k)
    primal = weighted_sum(weights_N, d2_N)
    return Clustering(
        centres_KD,
        prices_K,
        labels_N,
        loads_K,
        inertia=primal / total,
        balance=float(loads_K.max() * k / total),
        min_balance=float(loads_K.min() * k / total),
        duality_gap=duality_gap(loads_K, prices_K, primal),
        n_iterations=n_iterations,
    )


def duality_gap(loads_K: np.ndarray, prices_K: np.ndarray, primal: float) -> float:
    """(primal - dual) / primal of the transport problem with loads within bounds.

    The bounds are the smallest and the largest of `loads_K`, the weights of the clusters in the assignment
    argmin_j d2_ij + p_j. `primal` is the sum of weight times squared distance in that assignment.
    """
    # The dual is sum_i w_i min_j (d2_ij + p_j) less the dearest loads within these bounds: highest prices
    # fill first.
    k, low, high = len(loads_K), loads_K.min(), loads_K.max()
    extra_K = np.clip(loads_K.sum() - k * low - (high - low) * np.arange(k), 0, high - low)
    dearest = low * prices_K.sum() + weighted_sum(extra_K, np.sort(prices_K)[::-1])
    if primal <= 0:  # no inertia is below 0
        return 0.0
    return float(np.clip(dearest - weighted_sum(loads_K, prices_K), 0, primal)) / primal
