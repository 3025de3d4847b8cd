"""Labels of documents: how clusters agree with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from cbtm_pipeline.corpus import labels

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", "c", ""])), min_size=1, max_size=60)


@given(PAIRS, st.integers(0, 60))
def test_agreement_is_sklearns_whatever_the_shards(pairs: list[tuple[int, str]], cut: int) -> None:
    crossed = labels.Crossed(4)
    for some in (pairs[:cut], pairs[cut:]):
        crossed.add([name for _, name in some], np.array([j for j, _ in some], np.int32))
    found, known = crossed.content(), [(j, name) for j, name in pairs if name]
    if not known:
        assert found["purity"] is None and found["nmi"] is None
        return
    clusters, names = zip(*known, strict=True)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(names, clusters), abs=1e-9)
    largest = (
        max(clusters.count(j) and [name for c, name in known if c == j].count(x) for x in "abc")
        for j in range(4)
    )
    assert found["purity"] == pytest.approx(sum(largest) / len(known))
    assert found["n_labels"] == len(set(names))
    assert sum(map(sum, found["n_documents"])) == len(pairs)


def test_the_most_frequent_labels_come_first_and_not_all_are_shown() -> None:
    crossed = labels.Crossed(1)
    for i in range(60):
        crossed.add([f"{i:02d}"] * (1 + i // 2), np.zeros(1 + i // 2, int))
    found = crossed.content()
    assert found["names"][:3] == ["58", "59", "56"] and len(found["names"]) == labels.SHOWN
    assert found["n_labels"] == 60


def test_the_labels_of_a_cluster_for_people() -> None:
    shares = labels.top(["news", "", "x" * 40, "mail"], [70, 20, 8, 2], 100)
    assert labels.shown(shares) == f"news 70 %, (none) 20 %, {'x' * 23}… 8 %"
    assert labels.top(["news", "mail"], [0, 5], 5) == {"mail": 1.0}
