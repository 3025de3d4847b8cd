"""Balanced k-means: a power diagram whose prices make the clusters equally heavy.

Lloyd's iterations, in which each assignment is the balanced one of `transport`. Because that is  argmin_j d2_ij + p_j  for one price
per cluster, centres and prices together also balance documents that were never fitted, in one streaming pass.

Shapes: N documents, D dimensions, K clusters, R rows of one chunk, U distinct vectors, S of them in a sample, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cbtm_pipeline.clustering import distances, prices, transport
from cbtm_pipeline.clustering.distances import squared_distances

CHUNK_ROWS = 16384  # of a pass in float64
PASS_ROWS = 1 << 18  # of a pass in float32
DISTANCES = 1 << 23  # that are held at once
EXACT_ROWS = 8192  # with more, the clusters are exactly even only in the end
LARGEST = 1e15  # squares of larger components come close to the end of float32
SMALLEST, SAME = (
    1e-30,
    1e-13,
)  # squared distances below the one, or below the other times the squared norm, are rounding
SAMPLE_ROWS, SAMPLE_PER_CLUSTER = 8192, 128  # whichever is more documents is enough to find good seeds
TOLERANCE = 1e-4  # relative gain in inertia below which one more iteration is not worth its time
ROUGH = 1e-3  # the same for a sample: chance in it is larger, and more documents are to come


@dataclass(frozen=True)
class Clustering:
    """Centres, prices, and the certificate of the assignment that they give; all of it comes from `assign` on the fitted vectors.

    `loads_K` sums the weights per cluster, `balance` and `min_balance` are the largest and the smallest load over the mean load,
    `inertia` is the mean squared distance to the own centre, weighted by the weights.
    `duality_gap` is (primal - dual) / primal of the transport problem at these centres: no assignment with all its loads between
    the smallest and the largest load found here, not even one that splits documents, lowers the inertia by a larger share.
    """

    centres_KD: np.ndarray  # float32
    prices_K: np.ndarray  # float64, mean zero; all zero without balance
    labels_N: np.ndarray  # int32
    loads_K: np.ndarray  # float64
    inertia: float
    balance: float
    min_balance: float
    duality_gap: float
    n_iterations: int


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
    progress: Callable[[int, int, float, float], None] | None = None,
) -> Clustering:
    """The best of `n_init` runs of Lloyd's k-means from k-means++ seeds; equal loads if `balanced`, else the nearest centre.

    `weights_N` (positive; None: ones) weigh the documents in the loads, the centres and the inertia. A document, or a set of
    identical ones, heavier than a fair share counts as one fair share while fitting: it fills a cluster, the rest is shared evenly.
    Many documents are clustered first in a sample; the best run goes on in samples four times as large each, and at last in all. The best
    run is the one with the least inertia among those about as even as the evenest. `n_iterations` counts the last passes, those over all,
    and `progress(run, iteration, inertia, balance)` is called after each. Vectors too many for their distances to be held (DISTANCES) are
    copied to `device`, a name as torch knows it. No cluster is empty.
    Raises ValueError if k is not in 1 ... number of distinct vectors, for vectors that are not finite and for weights that are not
    positive.
    """
    assert n_init >= 1 and max_iterations >= 1
    x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
    weights_N = np.ones(len(x_ND)) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    _check(x_ND, k, weights_N)
    first_U, copy_N = _distinct(x_ND)
    mass_U = _at_most_a_share(np.bincount(copy_N, weights_N), k)
    levels = [1]  # every so manieth document is a sample
    while len(first_U) > 2 * levels[0] * max(SAMPLE_ROWS, SAMPLE_PER_CLUSTER * k):
        levels.insert(0, 4 * levels[0])

    def sample(level: int) -> tuple[np.ndarray, np.ndarray]:
        return x_ND[first_U[::level]], _at_most_a_share(mass_U[::level], k)

    def run(
        number: int, level: int, x_SD, mass_S, centres_KD, prices_K
    ) -> tuple[np.ndarray, np.ndarray, int]:
        def report(iteration: int, inertia: float, balance: float) -> None:
            if progress is not None:
                progress(number, iteration, inertia, balance)

        if not balanced or x_SD.shape[0] * k <= DISTANCES:
            return _lloyd(
                x_SD,
                mass_S,
                centres_KD,
                prices_K,
                balanced,
                max_iterations,
                report,
                TOLERANCE if level == 1 else ROUGH,
            )
        return _lloyd_in_passes(
            torch.from_numpy(x_SD).to(device), mass_S, centres_KD, prices_K, max_iterations, report
        )

    x_SD, mass_S = sample(levels[0])
    runs = []
    for number in range(n_init):
        seeds_KD = _plus_plus(x_SD, mass_S, k, np.random.default_rng([rng_seed, number]))
        found = run(number, levels[0], x_SD, mass_S, seeds_KD, np.zeros(k))
        runs.append((number, found, _certify(x_SD, mass_S, *found)))
    even_enough = 1.01 * min(certified.balance for *_, certified in runs) if balanced else np.inf
    number, found, _ = min((r for r in runs if r[-1].balance <= even_enough), key=lambda r: r[-1].inertia)
    for level in levels[1:]:
        found = run(number, level, *sample(level), *found[:2])
    return _certify(x_ND, weights_N, *found)


def assign(
    x_ND: np.ndarray, centres_KD: np.ndarray, prices_K: np.ndarray, chunk_rows: int = CHUNK_ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (int32) and squared distance to its centre (float32) of each document: argmin_j d2_ij + p_j, lowest j on ties.

    Needs memory for `chunk_rows` x K numbers. Raises ValueError for vectors that are not finite.
    """
    labels_N = np.empty(len(x_ND), dtype=np.int32)
    d2_N = np.empty(len(x_ND), dtype=np.float32)
    for start in range(0, len(x_ND), chunk_rows):
        rows = slice(start, start + chunk_rows)
        _check_vectors(x_ND[rows], start)
        d2_RK = squared_distances(x_ND[rows], centres_KD)
        labels_N[rows] = (d2_RK + prices_K).argmin(axis=1)
        d2_N[rows] = d2_RK[np.arange(len(d2_RK)), labels_N[rows]]
    return labels_N, d2_N


def _check(x_ND: np.ndarray, k: int, weights_N: np.ndarray) -> None:
    assert x_ND.ndim == 2 and weights_N.shape == x_ND.shape[:1]
    if k < 1:
        raise ValueError(f"cluster.k: {k}. Expected at least 1. Raise cluster.k.")
    if k > len(x_ND):
        raise ValueError(
            f"cluster.k: {k}. Expected at most {len(x_ND)}, the number of documents. Lower cluster.k or add documents."
        )
    for start in range(0, len(x_ND), CHUNK_ROWS):
        _check_vectors(x_ND[start : start + CHUNK_ROWS], start)
    good_N = (weights_N > 0) & (weights_N < np.inf)
    if not good_N.all():
        row = good_N.argmin()
        raise ValueError(
            f"weights: {weights_N[row]:g} in row {row}. Expected positive numbers. Drop documents without tokens."
        )


def _check_vectors(x_ND: np.ndarray, start: int) -> None:
    good_N = np.abs(x_ND).max(axis=1) < LARGEST
    if not good_N.all():
        row = start + good_N.argmin()
        raise ValueError(
            f"vectors: row {row} is not finite, or beyond {LARGEST:g}. Expected numbers. Embed the documents again."
        )


def _distinct(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One row of each distinct vector, and for each row the number of its vector. Prices cannot separate identical vectors.

    They are known by a hash of 64 bits, whose order is as good as random, and the same for any order of the rows. Where two different
    vectors had the same hash, one of them would only lend its weight to the other while fitting.
    """
    factors_2D = np.random.default_rng(0).integers(1 << 63, size=(2, x_ND.shape[1]), dtype=np.uint64) * 2 + 1
    hash_N = np.empty(len(x_ND), np.uint64)
    for start in range(0, len(x_ND), CHUNK_ROWS):
        words_RD = (x_ND[start : start + CHUNK_ROWS] + np.float32(0)).view(np.uint32) * factors_2D[
            0
        ]  # adding 0 makes -0 the same as 0
        hash_N[start : start + CHUNK_ROWS] = ((words_RD ^ words_RD >> np.uint64(29)) * factors_2D[1]).sum(
            axis=1
        )
    _, first_U, copy_N = np.unique(hash_N, return_index=True, return_inverse=True)
    return first_U, copy_N


def _at_most_a_share(mass_N: np.ndarray, k: int) -> np.ndarray:
    """Masses cut at the share s that solves s = sum_i min(m_i, s) / k: then no document is heavier than the mean load."""
    lightest_first = np.sort(mass_N)
    heaviest_H, rests_H = lightest_first[::-1][:k], np.cumsum(lightest_first)[::-1][:k]
    shares_H = rests_H / np.arange(
        k, k - len(rests_H), -1
    )  # if the H heaviest documents fill one cluster each
    return np.minimum(mass_N, shares_H[(heaviest_H <= shares_H).argmax()])


def _plus_plus(x_ND: np.ndarray, mass_N: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k different documents by greedy k-means++ (Arthur and Vassilvitskii 2007): the best of 2 + ln k draws each time."""
    rounding_N = np.maximum(SAME * np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64), SMALLEST)
    chosen = [int(rng.choice(len(x_ND), p=mass_N / mass_N.sum()))]
    d2_N = squared_distances(x_ND, x_ND[chosen])[:, 0]
    while len(chosen) < k:
        odds_N = mass_N * np.where(d2_N > rounding_N, d2_N, 0)
        if not odds_N.any():
            found = f"cluster.k: {k}. Expected at most {len(chosen)}, the number of distinct vectors."
            raise ValueError(f"{found} Lower cluster.k or remove duplicate documents.")
        candidates_C = rng.choice(len(x_ND), 2 + int(np.log(k)), p=odds_N / odds_N.sum())
        d2_NC = np.minimum(squared_distances(x_ND, x_ND[candidates_C]), d2_N[:, None])
        best = (mass_N @ d2_NC).argmin()
        chosen.append(int(candidates_C[best]))
        d2_N = d2_NC[:, best]
    return x_ND[chosen]


def _lloyd(x_ND, mass_N, centres_KD, prices_K, balanced, max_iterations, report, tolerance=TOLERANCE):
    """Centres, prices and the number of iterations. The last assignment is made with the returned centres, which are not moved again."""
    k = len(centres_KD)
    previous = np.inf
    for iteration in range(1, max_iterations + 1):
        if balanced:
            d2_NK = squared_distances(x_ND, centres_KD)
            labels_N, prices_K = transport.balance(d2_NK, mass_N, prices_K, exact=len(x_ND) <= EXACT_ROWS)
            d2_N = d2_NK[np.arange(len(x_ND)), labels_N]
        else:
            centres_KD, prices_K, labels_N, d2_N = _occupy(x_ND, mass_N, centres_KD, prices_K)
        inertia = float(mass_N @ d2_N / mass_N.sum())
        loads_K = np.bincount(labels_N, mass_N, k)
        report(iteration, inertia, float(loads_K.max() / loads_K.mean()))
        if previous - inertia <= tolerance * inertia or iteration == max_iterations:
            break
        previous = inertia
        centres_KD = _means(distances.sums(torch.from_numpy(x_ND), mass_N, labels_N, k), loads_K, centres_KD)
    if balanced and len(x_ND) > EXACT_ROWS:
        _, prices_K = transport.balance(d2_NK, mass_N, prices_K)
    centres_KD, prices_K, _, _ = _occupy(x_ND, mass_N, centres_KD, prices_K)
    return centres_KD, prices_K, iteration


def _lloyd_in_passes(x_ND, mass_N, centres_KD, prices_K, max_iterations, report):
    """The same for documents whose distances memory does not hold: prices of a sample while the centres move, of all in the end.

    An iteration is one pass. It ends where moves of the centres gain next to nothing, which is exact for the clusters as they are; the
    inertia itself also follows their loads, which differ by what is left to chance in the sample.
    """
    k = len(centres_KD)
    every = -(-len(x_ND) * k // DISTANCES)
    sample_SD, mass_S = x_ND[::every].cpu().numpy().copy(), _at_most_a_share(mass_N[::every], k)
    for iteration in range(1, max_iterations + 1):
        _, prices_K = transport.balance(
            squared_distances(sample_SD, centres_KD), mass_S, prices_K, exact=False
        )
        first_N, _, _, d2_N = distances.two_nearest(x_ND, centres_KD, prices_K)
        inertia, loads_K = float(mass_N @ d2_N / mass_N.sum()), np.bincount(first_N, mass_N, k)
        report(iteration, inertia, float(loads_K.max() / loads_K.mean()))
        moved_KD = _means(distances.sums(x_ND, mass_N, first_N, k), loads_K, centres_KD)
        gain = loads_K @ np.square(moved_KD.astype(np.float64) - centres_KD).sum(axis=1) / loads_K.sum()
        if gain <= TOLERANCE * inertia or iteration == max_iterations:
            break
        centres_KD = moved_KD

    def chunks():
        for start in range(0, len(x_ND), PASS_ROWS):
            yield x_ND[start : start + PASS_ROWS], mass_N[start : start + PASS_ROWS]

    prices_K, _ = prices.refine(chunks, centres_KD, prices_K)
    centres_KD, prices_K, _, _ = _occupy(x_ND.cpu().numpy(), mass_N, centres_KD, prices_K)
    return centres_KD, prices_K, iteration


def _means(sums_KD: np.ndarray, loads_K: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """The clusters' new centres (float32); an empty one stays where it was."""
    means_KD = sums_KD / np.where(loads_K > 0, loads_K, 1)[:, None]
    return np.where(loads_K[:, None] > 0, means_KD, centres_KD).astype(np.float32)


def _occupy(x_ND, mass_N, centres_KD, prices_K):
    """Move the centre of an empty cluster to the document that adds most to the inertia, until no cluster is empty.

    Without prices each move lowers the inertia, so this ends. With balance only exact ties between documents can lead here.
    """
    while True:
        labels_N, d2_N = assign(x_ND, centres_KD, prices_K)
        counts_K = np.bincount(labels_N, minlength=len(centres_KD))
        if counts_K.all():
            return centres_KD, prices_K, labels_N, d2_N
        centres_KD, prices_K = centres_KD.copy(), np.zeros(len(centres_KD))
        centres_KD[counts_K.argmin()] = x_ND[(mass_N * d2_N).argmax()]


def _certify(x_ND, weights_N, centres_KD, prices_K, n_iterations) -> Clustering:
    k, total = len(prices_K), float(weights_N.sum())
    labels_N, d2_N = assign(x_ND, centres_KD, prices_K)
    loads_K = np.bincount(labels_N, weights_N, k)
    primal = float(weights_N @ d2_N)
    balance, min_balance = float(loads_K.max() * k / total), float(loads_K.min() * k / total)
    gap = duality_gap(loads_K, prices_K, primal)
    return Clustering(
        centres_KD, prices_K, labels_N, loads_K, primal / total, balance, min_balance, gap, n_iterations
    )


def duality_gap(loads_K: np.ndarray, prices_K: np.ndarray, primal: float) -> float:
    """(primal - dual) / primal of the transport problem whose loads lie between the smallest and the largest of `loads_K`.

    `primal` is the sum of weight times squared distance in the assignment argmin_j d2_ij + p_j, and `loads_K` the weights of its clusters.
    """
    # The dual is sum_i w_i min_j (d2_ij + p_j) less the dearest loads within the same bounds, which fill the highest prices first.
    k, low, high = len(loads_K), loads_K.min(), loads_K.max()
    extra_K = np.clip(loads_K.sum() - k * low - (high - low) * np.arange(k), 0, high - low)
    dearest = low * prices_K.sum() + extra_K @ np.sort(prices_K)[::-1]
    return (
        float(np.clip(dearest - loads_K @ prices_K, 0, primal)) / primal if primal > 0 else 0.0
    )  # no inertia is below 0
