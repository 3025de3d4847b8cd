"""How a mixture uses its experts on held-out documents, and documents that show it.

Shapes: N tokens, D documents, K experts.
"""

from typing import Any

import numpy as np

MAX_TOKENS = 300  # of a document that is shown
LEAST_TOKENS = 16  # shorter documents show little
N_TYPICAL = 3  # documents of each cluster


def examples(logw_NK: np.ndarray, offsets: np.ndarray, doc_id_D: np.ndarray) -> list[dict[str, Any]]:
    """Up to three documents: with the most switches, with a middle number of them, and with the fewest.

    `expert` has the column of the largest weight at each of the first MAX_TOKENS tokens. Among equals, the
    smaller id comes first.
    """
    found = []
    for i, doc_id in enumerate(doc_id_D.tolist()):
        begin, end = int(offsets[i]), int(min(offsets[i + 1], offsets[i] + MAX_TOKENS))
        if end - begin >= LEAST_TOKENS:
            expert_T = logw_NK[begin:end].argmax(1)
            found.append((-int(np.count_nonzero(np.diff(expert_T))), str(doc_id), expert_T.tolist(), i))
    found.sort()
    places = sorted({0, len(found) // 2, len(found) - 1}) if found else []
    return [
        {"doc_id": found[i][1], "n_switches": -found[i][0], "expert": found[i][2], "row": found[i][3]}
        for i in places
    ]


def use(logw_NK: np.ndarray) -> dict[str, list[float]]:
    """How much each expert is used: its mean weight, and the share of tokens where its weight is largest."""
    n, k = logw_NK.shape
    largest_K = np.bincount(logw_NK.argmax(1), minlength=k) / max(n, 1)
    return {"mean_weight": np.exp(logw_NK).mean(axis=0).tolist(), "largest": largest_K.tolist()}


def typical(
    d2_NK: np.ndarray, offsets: np.ndarray, cluster_D: np.ndarray, doc_id_D: np.ndarray
) -> list[list[dict[str, Any]]]:
    """For each cluster, up to N_TYPICAL of its documents that end nearest to its centre, the nearest first.

    `row` is the number of the document. Documents of fewer than LEAST_TOKENS tokens come last.
    """
    lengths_D, last_D = np.diff(offsets), np.maximum(offsets[1:] - 1, 0)
    found = []
    for j in range(d2_NK.shape[1]):
        rows = np.flatnonzero((cluster_D == j) & (lengths_D > 0))
        order = np.lexsort((doc_id_D[rows], d2_NK[last_D[rows], j], lengths_D[rows] < LEAST_TOKENS))
        chosen = rows[order[:N_TYPICAL]].tolist()
        found.append([{"doc_id": str(doc_id_D[i]), "row": i} for i in chosen])
    return found
