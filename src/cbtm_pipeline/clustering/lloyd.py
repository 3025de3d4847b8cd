"""One run of Lloyd's k-means on weighted documents, balanced by prices or not: seeds, iterations, centres.

Each iteration assigns the documents and moves every centre to the mean of its documents. `run` chooses
between two ways: memory holds all distances (`in_memory`), or there are too many of them (`in_passes`). The
documents come in random order.

Shapes: N documents, D dimensions, K clusters, S documents of a sample, C candidates.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from cbtm_pipeline.clustering import distances, prices, transport
from cbtm_pipeline.clustering.distances import assign, squared_distances, weighted_sum

DISTANCES = 1 << 23  # that are held at once
EXACT_ROWS = 8192  # with more documents, the clusters become exactly even only at the end
PASS_ROWS = 1 << 18  # of a pass in float32
SMALLEST = 1e-30  # a squared distance below this is rounding,
SAME = 1e-13  # and so is one below this times the squared norm
TOLERANCE = 1e-4  # relative gain in inertia below which one more iteration is not worth its time
# The hash of splitmix64 (Steele, Lea and Flood 2014): shifts and factors. Its highest bits are the best.
SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
ROUGH = 1e-3  # this gain in a sample: it varies more by chance, and more documents follow

Report = Callable[[int, float, float], None]  # called with (iteration, inertia, largest load over the mean)


class Settings(NamedTuple):
    """Settings of a run. `device` (a name that torch knows) holds the vectors of `in_passes`."""

    balanced: bool
    max_iterations: int
    device: str = "cpu"


class State(NamedTuple):
    """Centres, prices, and the number of iterations that led to them."""

    centres_KD: np.ndarray  # float32
    prices_K: np.ndarray  # float64
    n_iterations: int = 0


def run(
    x_ND: np.ndarray, mass_N: np.ndarray, start: State, settings: Settings, report: Report, *, is_sample: bool
) -> State:
    """Iterate from `start`. `is_sample`: more documents follow, so a rougher result will do."""
    if not settings.balanced or x_ND.shape[0] * len(start.centres_KD) <= DISTANCES:
        return in_memory(x_ND, mass_N, start, settings, report, ROUGH if is_sample else TOLERANCE)
    return in_passes(
        torch.from_numpy(x_ND).to(settings.device), mass_N, start, settings.max_iterations, report
    )


def in_memory(
    x_ND: np.ndarray,
    mass_N: np.ndarray,
    start: State,
    settings: Settings,
    report: Report,
    tolerance: float = TOLERANCE,
) -> State:
    """Iterate with all distances in memory.

    The last assignment is made with the returned centres, which are not moved again.
    """
    centres_KD, prices_K, iteration = start
    k, previous, d2_NK = len(centres_KD), np.inf, np.empty((0, 0), np.float32)
    for iteration in range(1, settings.max_iterations + 1):
        if settings.balanced:
            d2_NK = squared_distances(x_ND, centres_KD)
            labels_N, prices_K = transport.balance(d2_NK, mass_N, prices_K, exact=len(x_ND) <= EXACT_ROWS)
            d2_N = d2_NK[np.arange(len(x_ND)), labels_N]
        else:
            centres_KD, prices_K, labels_N, d2_N = occupy(x_ND, mass_N, centres_KD, prices_K)
        inertia = weighted_sum(mass_N, d2_N) / float(mass_N.sum())
        loads_K = np.bincount(labels_N, mass_N, k)
        report(iteration, inertia, float(loads_K.max() / loads_K.mean()))
        if previous - inertia <= tolerance * inertia or iteration == settings.max_iterations:
            break
        previous = inertia
        centres_KD = _means(distances.sums(torch.from_numpy(x_ND), mass_N, labels_N, k), loads_K, centres_KD)
    if settings.balanced and len(x_ND) > EXACT_ROWS:
        _, prices_K = transport.balance(d2_NK, mass_N, prices_K)
    centres_KD, prices_K, _, _ = occupy(x_ND, mass_N, centres_KD, prices_K)
    return State(centres_KD, prices_K, iteration)


def in_passes(
    x_ND: torch.Tensor, mass_N: np.ndarray, start: State, max_iterations: int, report: Report
) -> State:
    """Iterate where memory does not hold all distances, with balanced clusters. An iteration is one pass.

    While the centres move, the prices balance a sample. At the end, they balance all documents. Iterations
    stop when moves of the centres gain next to nothing. This gain is exact for the current clusters. The
    inertia is no such measure: it also follows the loads of the clusters, which differ by chance because the
    prices come from a sample.
    """
    centres_KD, prices_K, iteration = start
    k = len(centres_KD)
    n = DISTANCES // k  # the order of the documents is random
    sample_SD, mass_S = x_ND[:n].cpu().numpy(), at_most_a_share(mass_N[:n], k)
    for iteration in range(1, max_iterations + 1):
        d2_SK = squared_distances(sample_SD, centres_KD)
        _, prices_K = transport.balance(d2_SK, mass_S, prices_K, exact=False)
        first_N, _, _, d2_N = distances.two_nearest(x_ND, centres_KD, prices_K)
        inertia = weighted_sum(mass_N, d2_N) / float(mass_N.sum())
        loads_K = np.bincount(first_N, mass_N, k)
        report(iteration, inertia, float(loads_K.max() / loads_K.mean()))
        moved_KD = _means(distances.sums(x_ND, mass_N, first_N, k), loads_K, centres_KD)
        moves_K = np.square(moved_KD.astype(np.float64) - centres_KD).sum(axis=1)
        gain = weighted_sum(loads_K, moves_K) / float(loads_K.sum())
        if gain <= TOLERANCE * inertia or iteration == max_iterations:
            break
        centres_KD = moved_KD

    prices_K, _ = prices.refine(lambda: _chunks(x_ND, mass_N), centres_KD, prices_K)
    centres_KD, prices_K, _, _ = occupy(x_ND.cpu().numpy(), mass_N, centres_KD, prices_K)
    return State(centres_KD, prices_K, iteration)


def _chunks(x_ND: torch.Tensor, mass_N: np.ndarray) -> Iterator[prices.Chunk]:
    """All vectors and masses, PASS_ROWS at a time."""
    for start in range(0, len(x_ND), PASS_ROWS):
        yield x_ND[start : start + PASS_ROWS], mass_N[start : start + PASS_ROWS]


def _means(sums_KD: np.ndarray, loads_K: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """The clusters' new centres (float32). The centre of an empty cluster stays."""
    means_KD = sums_KD / np.where(loads_K > 0, loads_K, 1)[:, None]
    return np.where(loads_K[:, None] > 0, means_KD, centres_KD).astype(np.float32)


def occupy(
    x_ND: np.ndarray, mass_N: np.ndarray, centres_KD: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Move centres until no cluster is empty. Returns centres, prices, labels and squared distances.

    The centre of an empty cluster moves to the document that adds most to the inertia, and all prices become
    zero. Without prices, each move lowers the inertia, so this ends. With balance, only exact ties between
    documents lead to empty clusters.
    """
    while True:
        labels_N, d2_N = assign(x_ND, centres_KD, prices_K)
        counts_K = np.bincount(labels_N, minlength=len(centres_KD))
        if counts_K.all():
            return centres_KD, prices_K, labels_N, d2_N
        centres_KD, prices_K = centres_KD.copy(), np.zeros(len(centres_KD))
        centres_KD[counts_K.argmin()] = x_ND[(mass_N * d2_N).argmax()]


def at_most_a_share(mass_N: np.ndarray, k: int) -> np.ndarray:
    """Masses cut at the share s that solves s = sum_i min(m_i, s) / k, so that none exceeds the mean load."""
    lightest_first = np.sort(mass_N)
    heaviest_H, rests_H = lightest_first[::-1][:k], np.cumsum(lightest_first)[::-1][:k]
    # shares if each of the H heaviest documents fills one cluster
    shares_H = rests_H / np.arange(k, k - len(rests_H), -1)
    return np.minimum(mass_N, shares_H[(heaviest_H <= shares_H).argmax()])


def seeds(
    x_ND: np.ndarray, mass_N: np.ndarray, keys_N: np.ndarray, k: int, rng: np.random.Generator
) -> np.ndarray:
    """k different documents by greedy k-means++ (Arthur and Vassilvitskii 2007), (K, D).

    Each seed is the best of 2 + ln k draws. Raises ValueError for fewer than k distinct vectors.
    """
    rounding_N = np.maximum(SAME * np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64), SMALLEST)
    chosen = [int(_draw(mass_N, keys_N, 1, rng)[0])]
    d2_N = squared_distances(x_ND, x_ND[chosen])[:, 0]
    while len(chosen) < k:
        odds_N = mass_N * np.where(d2_N > rounding_N, d2_N, 0)
        if not odds_N.any():
            found = f"cluster.k: {k}. Expected at most {len(chosen)}, the number of distinct vectors."
            raise ValueError(f"{found} Lower cluster.k or remove duplicate documents.")
        candidates_C = _draw(odds_N, keys_N, 2 + int(np.log(k)), rng)
        d2_NC = np.minimum(squared_distances(x_ND, x_ND[candidates_C]), d2_N[:, None])
        best = (mass_N[:, None] * d2_NC).sum(axis=0).argmin()
        chosen.append(int(candidates_C[best]))
        d2_N = d2_NC[:, best]
    return x_ND[chosen]


def _draw(odds_N: np.ndarray, keys_N: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n documents, each by these odds, (n,). A document may be drawn several times.

    Each draw is a race. A document arrives after an exponential time divided by its odds, and the first one
    is drawn. The exponential time is a hash of the document's key (random, uint64) and of the draw. So the
    other documents keep their times when one changes, comes or goes. Only a draw that this one wins or would
    have won has another result.
    """
    drawn = np.empty(n, np.int64)
    with np.errstate(divide="ignore"):
        rates_N = -1 / odds_N
    for i, draw in enumerate(rng.integers(1 << 64, size=n, dtype=np.uint64)):
        hash_N = keys_N ^ draw
        for shift, factor in SPLITMIX:
            hash_N = (hash_N ^ hash_N >> np.uint64(shift)) * np.uint64(factor)
        uniform_N = ((hash_N >> np.uint64(12)) + 0.5) * 2.0**-52  # above 0 and below 1
        drawn[i] = (np.log(uniform_N) * rates_N).argmin()
    return drawn
