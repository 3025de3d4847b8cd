"""Distances to centres: the passes over the vectors in which balanced k-means spends its time.

`two_nearest` and `sums` compute in float32, with the same code on CPUs and on a GPU. `squared_distances` and
`assign` sum in float64, for results that have to be exact. A GPU rounds differently.

On CPUs, no bit of a result depends on the number of threads. Chunks depend on shapes alone, one thread works
on each chunk, and sums over chunks are taken in order. The matrix products are those of torch, because torch
can be told to use one thread inside a pool of threads. A product may also be rounded by the alignment of its
operands in memory. So they lie in memory that torch reserved, which always has one alignment.

Shapes: N documents, D dimensions, K clusters, R rows of one chunk.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from cbtm_pipeline.base import threads

CACHED_ROWS = 2048  # rows whose distances stay in the CPU's cache
CHUNK_ROWS = 16384  # of a pass in float64
CHUNK_NUMBERS = {
    "cpu": 1 << 18,
    "cuda": 1 << 25,
}  # distances at once: a CPU's cache holds them; a GPU is busy
ALIGNMENT = 64  # bytes; all memory that torch reserves begins at a multiple of it
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
    k, x_ND = len(centres_KD), _aligned(x_ND)
    centres_KD = centres_KD.astype(np.float64)
    norms_K = np.square(centres_KD).sum(axis=1)
    slopes_DK, offsets_K, float_prices_K = (
        torch.tensor(a, dtype=torch.float32, device=x_ND.device)
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

    found = _in_chunks(of_chunk, len(x_ND), _chunk_rows(x_ND, k), on_cpu=x_ND.device.type == "cpu")
    return TwoNearest(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _argmin(cost_RK: torch.Tensor) -> torch.Tensor:
    """The column of each row's smallest number, (R, 1)."""
    if cost_RK.device.type == "cpu":  # where NumPy is four times as fast
        return torch.from_numpy(cost_RK.numpy().argmin(axis=1, keepdims=True))
    return cost_RK.argmin(dim=1, keepdim=True)


def sums(x_ND: torch.Tensor, mass_N: np.ndarray, labels_N: np.ndarray, k: int) -> np.ndarray:
    """Sum of the vectors of each cluster times their masses: float64 (K, D)."""
    x_ND = _aligned(x_ND)

    def of_chunk(rows: slice) -> np.ndarray:
        labels_R = torch.from_numpy(labels_N[rows]).to(x_ND.device)
        mass_R = torch.from_numpy(mass_N[rows]).to(x_ND.device)
        zeros_RK = x_ND.new_zeros((len(labels_R), k))
        mass_RK = zeros_RK.scatter_(1, labels_R[:, None].long(), mass_R[:, None].float())
        return (mass_RK.T @ x_ND[rows]).cpu().numpy()  # always in the same order, unlike index_add_

    found = _in_chunks(of_chunk, len(x_ND), _chunk_rows(x_ND, k), on_cpu=x_ND.device.type == "cpu")
    return np.stack(found).sum(axis=0, dtype=np.float64)


def _chunk_rows(x_ND: torch.Tensor, k: int) -> int:
    """Rows of a chunk of a pass in float32."""
    return max(256, CHUNK_NUMBERS[x_ND.device.type] // k)


def _aligned(x_ND: torch.Tensor) -> torch.Tensor:
    """The same vectors at an address that is a multiple of ALIGNMENT, copied if they are elsewhere."""
    return x_ND if x_ND.data_ptr() % ALIGNMENT == 0 else x_ND.clone()


def gather(x_ND: np.ndarray, rows_R: np.ndarray) -> np.ndarray:
    """These rows, in memory that torch reserved."""
    x_RD = torch.empty((len(rows_R), x_ND.shape[1]), dtype=torch.float32).numpy()
    return np.take(x_ND, rows_R, axis=0, out=x_RD, mode="clip")  # other modes copy once more


def _in_chunks(function: Callable[[slice], A], n: int, n_rows: int, *, on_cpu: bool) -> list[A]:
    """Results of `function` for consecutive slices of n rows, in order.

    On CPUs, as many threads as torch has call it side by side. Within a call, torch uses one thread.
    """
    chunks = [slice(start, start + n_rows) for start in range(0, n, n_rows)]
    with threads.one_thread() as n_threads:
        n_workers = min(n_threads, len(chunks) // 2)  # to start a thread takes about as long as a chunk
        if on_cpu and n_workers > 1:
            with ThreadPoolExecutor(n_workers, initializer=threads.use_one_thread) as pool:
                return list(pool.map(function, chunks))
        return list(map(function, chunks))


def weighted_sum(weights_N: np.ndarray, values_N: np.ndarray) -> float:
    """Their dot product, in float64. A BLAS would sum it by threads."""
    return float((weights_N * values_N).sum(dtype=np.float64))


def solve(a_KK: np.ndarray, b_K: np.ndarray) -> np.ndarray:
    """The solution x of a x = b, in float64. No bit of it depends on the number of threads."""
    with threads.one_thread():
        return torch.linalg.solve(torch.from_numpy(a_KK), torch.from_numpy(b_K)).numpy()


def squared_distances(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances d2_NK, float32, never negative.

    Sums are float64, so that the rounded result hardly ever depends on the rows beside a row.
    """
    centres = torch.tensor(centres_KD, dtype=torch.float64)
    norms_K, slopes_DK = torch.linalg.vecdot(centres, centres), (-2 * centres.T).contiguous()
    d2_NK = np.empty((len(x_ND), len(centres)), dtype=np.float32)

    def of_chunk(rows: slice) -> None:
        x_RD = torch.empty(x_ND[rows].shape, dtype=torch.float64)
        x_RD.numpy()[:] = x_ND[rows]
        d2_RK = torch.addmm(norms_K, x_RD, slopes_DK)
        d2_RK += torch.linalg.vecdot(x_RD, x_RD)[:, None]
        d2_NK[rows] = d2_RK.clamp_min_(0).numpy()

    _in_chunks(of_chunk, len(x_ND), CACHED_ROWS, on_cpu=True)
    return d2_NK


def directions_to_centres(s_ND: torch.Tensor, centres_KD: np.ndarray, of_zero: float) -> np.ndarray:
    """Squared distances d2_NK, float32, of s / |s| to the centres; `of_zero` if s is 0. All in float64.

    d2 = 1 - 2 s c / |s| + |c|^2: the quotients are not written out, which halves the time.
    """
    centres = torch.tensor(centres_KD, dtype=torch.float64)
    lengths_N = torch.linalg.vecdot(s_ND, s_ND).sqrt_()
    d2_NK = s_ND @ (-2 * centres.T).contiguous()
    d2_NK /= lengths_N[:, None]
    d2_NK += 1 + torch.linalg.vecdot(centres, centres)
    d2_NK[lengths_N == 0] = of_zero
    return d2_NK.clamp_min_(0).float().numpy()


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
