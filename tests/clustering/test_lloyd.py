"""Lloyd's iterations where clusters become empty or centres coincide."""

import numpy as np
import pytest

from cbtm_pipeline.clustering import kmeans, lloyd


@pytest.mark.parametrize("prices_K", [[0.0, 0.0, 0.0], [-9.0, 4.0, 5.0]])
def test_empty_clusters_are_moved_to_documents(prices_K: list[float]) -> None:
    x_ND = np.random.default_rng(0).standard_normal((50, 2), dtype=np.float32)
    centres_KD = np.array([[0, 0], [0, 0], [99, 99]], dtype=np.float32)
    moved_KD, moved_K, labels_N, _ = lloyd.occupy(x_ND, np.ones(50), centres_KD, np.array(prices_K))
    assert set(labels_N) == {0, 1, 2}
    assert (labels_N == kmeans.assign(x_ND, moved_KD, moved_K)[0]).all()


def test_centres_that_coincide_end_in_two_clusters() -> None:
    """All documents tie between the two clusters at the start, so no prices separate them."""
    x_ND = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32)
    start = lloyd.State(np.zeros((2, 2), np.float32), np.zeros(2))
    settings = lloyd.Settings(balanced=True, max_iterations=9)
    centres_KD, prices_K, _ = lloyd.in_memory(x_ND, np.ones(4), start, settings, lambda *_: None)
    assert np.bincount(kmeans.assign(x_ND, centres_KD, prices_K)[0], minlength=2).all()
