"""Held-out documents that show how the router switches: which expert weighs most at each of their tokens."""

from typing import Any

import numpy as np

MAX_TOKENS = 300  # of a document that is shown
LEAST_TOKENS = 16  # shorter documents show little


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
