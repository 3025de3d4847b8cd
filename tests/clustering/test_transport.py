"""The balanced assignment: optimal, with few searches, and no cluster empty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import made_corpus
from cbtm_pipeline.clustering import kmeans, transport

QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 6))
def test_the_balanced_assignment_is_optimal(seed: int, per_cluster: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    d2_NK = rng.random((per_cluster * k, k), dtype=np.float32)
    labels_N, prices_K = transport.balance(d2_NK, np.ones(len(d2_NK)), rng.standard_normal(k))
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (np.bincount(labels_N) == per_cluster).all()
    rows, columns = linear_sum_assignment(np.repeat(d2_NK, per_cluster, axis=1))
    assert d2_NK[np.arange(len(d2_NK)), labels_N].sum() == pytest.approx(
        d2_NK[rows, columns // per_cluster].sum(), rel=1e-5
    )


def test_the_balanced_assignment_is_optimal_where_clusters_have_no_common_border() -> None:
    """With few tight topics and more clusters, most pairs of clusters have no documents between them."""
    x_ND, _ = made_corpus.unit_vectors(1600, 20, 5, 0, spread=10)
    d2_NK = kmeans.squared_distances(x_ND, x_ND[:16])
    labels_N, prices_K = transport.balance(d2_NK, np.ones(1600), np.zeros(16))
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (np.bincount(labels_N) == 100).all()
    rows, columns = linear_sum_assignment(np.repeat(d2_NK, 100, axis=1))
    assert d2_NK[np.arange(1600), labels_N].sum() == pytest.approx(
        d2_NK[rows, columns // 100].sum(), rel=1e-5
    )


def test_prices_of_a_sample_save_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, _ = made_corpus.unit_vectors(3200, 20, 5, 0, spread=10)
    d2_NK = kmeans.squared_distances(x_ND, x_ND[:16])
    searches = []
    shortest_paths = transport._shortest_paths
    monkeypatch.setattr(
        transport, "_shortest_paths", lambda *args: searches.append(args) or shortest_paths(*args)
    )
    transport.balance(d2_NK, np.ones(3200), np.zeros(16))
    assert 0 < len(searches) < 300  # it would be 1032 from the prices that the Newton steps alone reach


def test_no_cluster_stays_empty_where_the_next_document_weighs_nearly_nothing() -> None:
    x_ND = np.array([[-1.1], [-1], [0], [1], [1.1]], dtype=np.float32)
    d2_NK = kmeans.squared_distances(x_ND, np.array([[-1], [1.1], [0.1]], dtype=np.float32))
    mass_N, prices_K = np.array([0.5, 0.5, 1e-14, 0.5, 0.5]), np.array([0, 0, 9.0])
    labels_N, prices_K = transport._even_out(d2_NK, mass_N, (d2_NK + prices_K).argmin(axis=1), prices_K)
    assert set(labels_N) == {0, 1, 2}
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
