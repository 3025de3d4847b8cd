"""Soft borders: documents near the border of a cluster are lent to their neighbour's expert, too.

The gap of a document is what its second cluster costs more than its own: the difference of squared distance
plus price. Each cluster borrows the documents of the smallest gaps, until they hold a share of its expert's
tokens (cluster.border_share). A document is lent once at most, to its second cluster. It stays in its own
cluster, and the expert's training has as many steps as without.

Shapes: N documents, K clusters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Border(NamedTuple):
    """Documents of a shard: their cluster, the second best one, the gap between both, and their tokens."""

    own_N: np.ndarray  # int32
    second_N: np.ndarray  # int32
    gap_N: np.ndarray  # float64; below zero where labels decide against the text
    n_tokens_N: np.ndarray


def border(costs_NK: np.ndarray, own_N: np.ndarray, n_tokens_N: np.ndarray) -> Border:
    """The second cluster of each document: of least cost but for its own. K >= 2.

    `costs_NK` is the squared distance plus price.
    """
    rows, others_NK = np.arange(len(own_N)), np.array(costs_NK, np.float64)
    own_cost_N = others_NK[rows, own_N]
    others_NK[rows, own_N] = np.inf
    second_N = others_NK.argmin(axis=1).astype(np.int32)
    return Border(own_N, second_N, others_NK[rows, second_N] - own_cost_N, n_tokens_N)


def lend(shards: Sequence[Border], k: int, share: float) -> list[np.ndarray]:
    """The cluster that each document is lent to, -1 for none (int32), shard by shard.

    The borrowed documents of a cluster hold at most `share` of the tokens of its own and of these. They hold
    less only by one document, or where no more documents have it as their second cluster. Of equal gaps, the
    earlier document is lent. Holds about 20 bytes for each document of the corpus.
    """
    own_N, second_N, gap_N, n_tokens_N = (np.concatenate(column) for column in zip(*shards, strict=True))
    quotas_K = share / (1 - share) * np.bincount(own_N, n_tokens_N, k)
    lent_N = np.full(len(own_N), -1, np.int32)
    for j in range(k):
        candidates = np.flatnonzero(second_N == j)
        candidates = candidates[np.argsort(gap_N[candidates], kind="stable")]
        borrowed = candidates[np.cumsum(n_tokens_N[candidates]) <= quotas_K[j]]
        lent_N[borrowed] = j
    return np.split(lent_N, np.cumsum([len(shard.own_N) for shard in shards])[:-1])
