"""The second round: a document goes to the expert that predicts it best, balanced by prices.

The cost of expert j for document i is its mean negative log-probability per token. Document i belongs to
argmin_j nll_ij + p_j. The prices p are those of the balanced assignment (`transport`), as in k-means, where
squared distances cost.

Documents that no expert has read go by their text, to the nearest of the new centres: at prices of their own,
which balance them.

Shapes: N documents, D dimensions, K clusters.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from cbtm_pipeline.clustering import kmeans, labelled, prices, transport


class Round(NamedTuple):
    """The clusters of the documents that experts have read, and what decides about all others."""

    labels_N: np.ndarray  # int32
    prices_K: np.ndarray  # nats per token, mean zero
    centres_KD: np.ndarray  # float32, weighted mean vectors of the clusters
    loads_K: np.ndarray
    nll: float  # weighted mean of the own cluster's cost
    duality_gap: float  # as in kmeans.Clustering, with nll for squared distances


def assign(nll_NK: np.ndarray, weights_N: np.ndarray, balanced: bool) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each document (int32), and the prices. Ties go to the lowest cluster."""
    k = nll_NK.shape[1]
    prices_K = np.zeros(k)
    if balanced and k > 1:
        _, prices_K = transport.balance(nll_NK, np.asarray(weights_N, np.float64), prices_K)
    return (nll_NK + prices_K).argmin(axis=1).astype(np.int32), prices_K


def deal(x_ND: np.ndarray, nll_NK: np.ndarray, weights_N: np.ndarray, balanced: bool) -> Round:
    """The clusters of documents with these vectors and costs."""
    k = nll_NK.shape[1]
    labels_N, prices_K = assign(nll_NK, weights_N, balanced)
    own_N = nll_NK[np.arange(len(labels_N)), labels_N].astype(np.float64)
    primal, loads_K = float((weights_N * own_N).sum()), np.bincount(labels_N, weights_N, k)
    return Round(
        labels_N,
        prices_K,
        labelled.centres(x_ND, weights_N, labels_N, k),
        loads_K,
        primal / float(np.sum(weights_N)),
        kmeans.duality_gap(loads_K, prices_K, primal),
    )


def text_prices(
    read_chunks: Callable[[], Iterable[prices.Chunk]], centres_KD: np.ndarray, balanced: bool
) -> np.ndarray:
    """The prices of documents that go by their text; zero if there are none. `read_chunks` yields them."""
    none_K = np.zeros(len(centres_KD))
    if not balanced or len(centres_KD) == 1 or not any(len(x_RD) for x_RD, _ in read_chunks()):
        return none_K
    return prices.refine(read_chunks, centres_KD, none_K)[0]
