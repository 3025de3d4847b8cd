"""How a mixture uses its experts."""

import numpy as np

from cbtm_pipeline.mixture import switches


def test_use_is_the_mean_weight_and_the_share_of_first_places() -> None:
    logw_NK = np.log(np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.8, 0.2]]))
    found = switches.use(logw_NK)
    np.testing.assert_allclose(found["mean_weight"], [0.55, 0.45])
    assert found["largest"] == [0.75, 0.25]


def test_typical_documents_end_nearest_to_their_centre_and_short_ones_come_last() -> None:
    lengths = [20, 20, 3, 20, 20, 20]
    offsets = np.cumsum([0, *lengths])
    end_d2 = [0.5, 0.2, 0.0, 0.9, 0.2, 0.1]
    d2_NK = np.ones((offsets[-1], 2))
    d2_NK[offsets[1:] - 1, 0] = end_d2
    cluster_D, ids = np.array([0, 0, 0, 0, 0, 1]), np.array(list("fedcba"))
    first, second = switches.typical(d2_NK, offsets, cluster_D, ids)
    assert [one["doc_id"] for one in first] == ["b", "e", "f"] and [one["row"] for one in first] == [4, 1, 0]
    assert [one["doc_id"] for one in second] == ["a"]
