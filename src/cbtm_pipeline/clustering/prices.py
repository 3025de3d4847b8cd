"""Prices for a corpus that is larger than the clustered sample, from a few passes over its vectors.

The dual of the transport problem,  sum_i w_i min_j (d2_ij + p_j) - mean load * sum_j p_j,  is concave in the
prices and highest where all loads are equal. Its gradient is the loads less their mean. Its Hessian is the
weight at the borders between clusters, as in `transport`, which is exact but holds all distances at once.
Prices from a sample are nearly right, so a few Newton steps correct them.

Shapes: R documents of a chunk, D dimensions, K clusters.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from cbtm_pipeline.clustering import distances, transport

GOAL = 1.01  # largest load over the mean that needs no more steps
MAX_PASSES = 16
REACH = (
    4.0  # border widths that a price may move in the first step: no pass has seen what lies beyond the border
)
NEAR = 0.05  # least share of the documents, nearest to a border, that estimates the derivative of the loads
SETTLED_DISTANCES = 1 << 23  # held at once where Newton steps get stuck

Chunk = tuple[np.ndarray | torch.Tensor, np.ndarray]  # vectors (float32) and weights


def cut(x_ND: np.ndarray, weights_N: np.ndarray) -> Iterator[Chunk]:
    """Vectors and their weights in chunks of distances.CHUNK_ROWS."""
    for start in range(0, len(x_ND), distances.CHUNK_ROWS):
        rows = slice(start, start + distances.CHUNK_ROWS)
        yield x_ND[rows], weights_N[rows]


class Survey(NamedTuple):
    """Result of one pass over the corpus at given prices: loads, their derivative, and the dual."""

    loads_K: np.ndarray
    border_KK: np.ndarray  # weight that crosses the border between two clusters per unit of price
    width: float  # of the border, in units of price
    dual: float  # of the transport problem: concave in the prices, highest where the loads are equal

    @property
    def max_load(self) -> float:
        """Largest load over the mean."""
        return float(self.loads_K.max() / self.loads_K.mean())


def refine(
    read_chunks: Callable[[], Iterable[Chunk]], centres_KD: np.ndarray, prices_K: np.ndarray
) -> tuple[np.ndarray, float]:
    """Prices that balance the whole corpus, and its largest load over the mean.

    Damped Newton steps climb the dual, one pass each. `read_chunks()` yields (x_RD, weights_R), the whole
    corpus chunk by chunk. Returns the best balanced prices of all passes, which are never worse than
    `prices_K`.
    """
    at_K, at = prices_K, survey(read_chunks(), centres_KD, prices_K, NEAR)
    best_K, best, reach = at_K, at.max_load, REACH
    for _ in range(MAX_PASSES):
        if best <= GOAL:
            break
        step_K = _newton_step(at, reach * at.width)
        wrong = float(np.abs(at.loads_K / at.loads_K.mean() - 1).mean() / 2)
        found = survey(read_chunks(), centres_KD, at_K + step_K, float(np.clip(2 * wrong, NEAR, 1)))
        if found.max_load < best:
            best_K, best = at_K + step_K, found.max_load
        if found.dual > at.dual:
            at_K, at, reach = at_K + step_K, found, 2 * reach
        else:
            reach = np.abs(step_K).max() / max(at.width, 1e-300) / 3
    if best > GOAL:
        settled_K = _settled_on_sample(read_chunks, centres_KD, best_K)
        settled = survey(read_chunks(), centres_KD, settled_K, NEAR).max_load
        if settled < best:
            return settled_K, settled
    return best_K, best


def _settled_on_sample(
    read_chunks: Callable[[], Iterable[Chunk]], centres_KD: np.ndarray, prices_K: np.ndarray
) -> np.ndarray:
    """Prices that balance every n-th document exactly.

    Where documents lie in clumps, loads jump, and no derivative predicts the jump.
    """
    n_documents = sum(len(weights_R) for _, weights_R in read_chunks())
    step = -(-n_documents * len(prices_K) // SETTLED_DISTANCES)
    parts = [(_tensor(x_RD[::step]).cpu().numpy(), weights_R[::step]) for x_RD, weights_R in read_chunks()]
    x_RD, weights_R = (np.concatenate(part) for part in zip(*parts, strict=True))
    d2_RK = distances.squared_distances(x_RD, centres_KD)
    return transport.balance(d2_RK, weights_R.astype(np.float64), prices_K)[1]


def _newton_step(at: Survey, longest: float) -> np.ndarray:
    """A step of the prices, (K,), with mean zero.

    Before the mean is taken off, no price moves by more than `longest`.
    """
    k = len(at.loads_K)
    laplacian_KK = np.diag(at.border_KK.sum(axis=1)) - at.border_KK
    # a cluster that borders on no other would make the system singular
    laplacian_KK += np.eye(k) * (1e-3 * np.trace(laplacian_KK) / k + 1e-300)
    step_K = distances.solve(laplacian_KK, at.loads_K - at.loads_K.mean())
    step_K = np.clip(step_K - step_K.mean(), -longest, longest)
    return step_K - step_K.mean()


def survey(chunks: Iterable[Chunk], centres_KD: np.ndarray, prices_K: np.ndarray, near: float) -> Survey:
    """One pass over the corpus.

    `near` sets the width of the border: this share of the first chunk's documents lies within it. They
    estimate the derivative of the loads.
    """
    k = len(prices_K)
    loads_K, border_KK, dual, width = np.zeros(k), np.zeros((k, k)), 0.0, None
    for x_RD, weights_R in chunks:
        first_R, second_R, margin_R, d2_R = distances.two_nearest(_tensor(x_RD), centres_KD, prices_K)
        loads_K += np.bincount(first_R, weights_R, k)
        dual += distances.weighted_sum(weights_R, d2_R + (prices_K - prices_K.mean())[first_R])
        if k > 1:
            width = max(float(np.quantile(margin_R, near)), 1e-12) if width is None else width
            near_R = margin_R <= width
            pairs = first_R[near_R].astype(np.int64) * k + second_R[near_R]
            border_KK += np.bincount(pairs, weights_R[near_R], k * k).reshape(k, k) / (2 * width)
    return Survey(loads_K, border_KK + border_KK.T, width or 0.0, dual)


def _tensor(x_RD: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The vectors as a tensor on their device. Copies those of a memory-mapped file, which are read-only."""
    return x_RD if isinstance(x_RD, torch.Tensor) else torch.tensor(x_RD)
