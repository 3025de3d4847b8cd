"""Distances to centres: the passes over the vectors in which balanced k-means spends its time.

`two_nearest` and `sums` compute in float32, with the same code on CPUs and on a GPU. The chunks depend on
shapes alone, and one thread works on each chunk. So a result on CPUs does not depend on the number of
threads. A GPU rounds differently. `squared_distances` and `assign` sum in float64, for results that have to
be exact.

Shapes: N documents, D dimensions, K clusters, R rows of one chunk.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

CACHED_ROWS = 2048  # rows whose distances stay in the CPU's cache
CHUNK_ROWS = 16384  # of a pass in float64
CHUNK_NUMBERS = {
    "cpu": 1 << 18,
    "cuda": 1 << 25,
}  # distances at once: a CPU's cache holds them; a GPU is busy
LARGEST = 1e15  # squares of larger components come close to the largest float32
A = TypeVar("A")


class TwoNearest(NamedTuple):
    """For each document, the two clusters of least d2 + p, the difference between both, and d2 to the first.

    With one cluster, the second is the first, and the margin is infinite.
    """

    first_N: np.ndarray  # int32
    second_N: np.ndarray  # int32
    margin_N: np.ndarray  # float32
    d2_N: np.ndarray  # float32


def two_nearest(x_ND: torch.Tensor, centres_KD: np.ndarray, prices_K: np.ndarray) -> TwoNearest:
    """One pass over float32 vectors on any device."""
    k = len(centres_KD)
    centres_KD = centres_KD.astype(np.float64)
    norms_K = np.square(centres_KD).sum(axis=1)
    slopes_DK, offsets_K, float_prices_K = (
        torch.from_numpy(a.astype(np.float32)).to(x_ND.device)
        for a in (-2 * centres_KD.T, norms_K + prices_K, prices_K)
    )

    def of_chunk(rows: slice) -> tuple[np.ndarray, ...]:
        x_RD = x_ND[rows]
        cost_RK = torch.addmm(offsets_K, x_RD, slopes_DK)  # without the document's squared norm
        first_R1 = _argmin(cost_RK)
        lowest_R1 = cost_RK.gather(1, first_R1)
        second_R1 = _argmin(cost_RK.scatter_(1, first_R1, torch.inf))
        margin_R1 = cost_RK.gather(1, second_R1) - lowest_R1
        norms_R1 = torch.linalg.vecdot(x_RD, x_RD)[:, None]
        d2_R1 = (lowest_R1 - float_prices_K[first_R1] + norms_R1).clamp_min_(0)
        return tuple(a[:, 0].cpu().numpy() for a in (first_R1.int(), second_R1.int(), margin_R1, d2_R1))

    return TwoNearest(*(np.concatenate(part) for part in zip(*_in_chunks(of_chunk, x_ND, k), strict=True)))


def _argmin(cost_RK: torch.Tensor) -> torch.Tensor:
    """The column of each row's smallest number, (R, 1)."""
    if cost_RK.device.type == "cpu":  # where NumPy is four times as fast
        return torch.from_numpy(cost_RK.numpy().argmin(axis=1, keepdims=True))
    return cost_RK.argmin(dim=1, keepdim=True)


def sums(x_ND: torch.Tensor, mass_N: np.ndarray, labels_N: np.ndarray, k: int) -> np.ndarray:
    """Sum of the vectors of each cluster times their masses: float64 (K, D)."""

    def of_chunk(rows: slice) -> np.ndarray:
        labels_R = torch.from_numpy(labels_N[rows]).to(x_ND.device)
        mass_R = torch.from_numpy(mass_N[rows]).to(x_ND.device)
        zeros_RK = x_ND.new_zeros((len(labels_R), k))
        mass_RK = zeros_RK.scatter_(1, labels_R[:, None].long(), mass_R[:, None].float())
        return (mass_RK.T @ x_ND[rows]).cpu().numpy()  # always in the same order, unlike index_add_

    return np.stack(_in_chunks(of_chunk, x_ND, k)).sum(axis=0, dtype=np.float64)


def _in_chunks(function: Callable[[slice], A], x_ND: torch.Tensor, k: int) -> list[A]:
    """Results of `function` for consecutive slices of the rows of `x_ND`, in order.

    On CPUs, as many threads as torch has call it side by side. Within a call, torch uses one thread.
    """
    n_rows = max(256, CHUNK_NUMBERS[x_ND.device.type] // k)
    chunks = [slice(start, start + n_rows) for start in range(0, len(x_ND), n_rows)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if x_ND.device.type == "cpu" and min(n_threads, len(chunks)) > 1:
            with ThreadPoolExecutor(n_threads) as pool:
                return list(pool.map(function, chunks))
        return list(map(function, chunks))
    finally:
        torch.set_num_threads(n_threads)


def squared_distances(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances d2_NK, float32, never negative.

    Sums are float64, so that the rounded result hardly ever depends on chunk sizes and the number of threads.
    """
    centres_KD = centres_KD.astype(np.float64)
    norms_K = np.einsum("kd,kd->k", centres_KD, centres_KD)
    d2_NK = np.empty((len(x_ND), len(centres_KD)), dtype=np.float32)
    for start in range(0, len(x_ND), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        x_RD = x_ND[rows].astype(np.float64)
        d2_RK = x_RD @ (-2 * centres_KD.T)
        d2_RK += norms_K
        d2_RK += np.einsum("rd,rd->r", x_RD, x_RD)[:, None]
        d2_NK[rows] = np.maximum(d2_RK, 0, out=d2_RK)
    return d2_NK


def assign(
    x_ND: np.ndarray, centres_KD: np.ndarray, prices_K: np.ndarray, chunk_rows: int = CHUNK_ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (int32) of each document, argmin_j d2_ij + p_j, and squared distance to its centre (float32).

    A tie goes to the lowest j. Needs memory for `chunk_rows` x K numbers. Raises ValueError for vectors that
    are not finite.
    """
    labels_N = np.empty(len(x_ND), dtype=np.int32)
    d2_N = np.empty(len(x_ND), dtype=np.float32)
    for start in range(0, len(x_ND), chunk_rows):
        rows = slice(start, start + chunk_rows)
        check_vectors(x_ND[rows], start)
        d2_RK = squared_distances(x_ND[rows], centres_KD)
        labels_N[rows] = (d2_RK + prices_K).argmin(axis=1)
        d2_N[rows] = d2_RK[np.arange(len(d2_RK)), labels_N[rows]]
    return labels_N, d2_N


def check_vectors(x_RD: np.ndarray, start: int) -> None:
    """Raise ValueError for a component that is not finite or beyond LARGEST.

    `start` is the first row's number.
    """
    good_R = np.abs(x_RD).max(axis=1) < LARGEST
    if not good_R.all():
        row = start + good_R.argmin()
        raise ValueError(
            f"vectors: row {row} is not finite, or beyond {LARGEST:g}. Expected numbers. "
            "Embed the documents again."
        )
