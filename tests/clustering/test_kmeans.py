from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from sklearn.cluster import KMeans

from cbtm_pipeline.clustering import kmeans, transport

QUICK = settings(max_examples=40, deadline=None)
FITTED: dict[str, Any] = {"rng_seed": 0, "n_init": 2, "max_iterations": 30}


def mixture(n: int, d: int, n_topics: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around topics of unequal size, and token counts."""
    rng = np.random.default_rng(seed)
    topics = rng.choice(n_topics, n, p=rng.dirichlet(np.ones(n_topics)))
    x_ND = spread * rng.standard_normal((n_topics, d))[topics] + rng.standard_normal((n, d))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32), np.ceil(
        rng.lognormal(5.5, 1, n)
    )


def check(found: kmeans.Clustering, x_ND: np.ndarray, k: int, weights_N: np.ndarray | None = None) -> None:
    """What holds for every result: it is what `assign` says, and its certificate is right."""
    weights_N = np.ones(len(x_ND)) if weights_N is None else weights_N
    labels_N, d2_N = kmeans.assign(x_ND, found.centres_KD, found.prices_K)
    assert (found.labels_N == labels_N).all()
    assert set(labels_N) == set(range(k))
    assert (found.centres_KD.dtype, found.prices_K.dtype, found.labels_N.dtype) == (
        np.float32,
        np.float64,
        np.int32,
    )
    assert found.prices_K.mean() == pytest.approx(0, abs=1e-12 * max(1, np.abs(found.prices_K).max()))
    assert found.loads_K == pytest.approx(np.bincount(labels_N, weights_N, k))
    assert found.balance == pytest.approx(found.loads_K.max() / found.loads_K.mean())
    assert found.min_balance == pytest.approx(found.loads_K.min() / found.loads_K.mean())
    assert found.inertia == pytest.approx(np.average(d2_N, weights=weights_N), rel=1e-5)
    assert 0 <= found.duality_gap <= 1


def same(a: kmeans.Clustering, b: kmeans.Clustering) -> bool:
    return all(
        (getattr(a, name) == getattr(b, name)).all() for name in ("centres_KD", "prices_K", "labels_N")
    )


@QUICK
@given(st.integers(0, 99), st.integers(1, 5000), st.integers(1, 9), st.sampled_from([1e-6, 1.0, 1e6]))
def test_squared_distances_are_accurate(seed, n, d, scale):
    rng = np.random.default_rng(seed)
    x_ND, y_KD = (scale * rng.standard_normal((m, d), dtype=np.float32) for m in (n, 3))
    y_KD[0] = x_ND[0]
    expected_NK = np.square(x_ND[:, None].astype(np.float64) - y_KD).sum(axis=2)
    d2_NK = kmeans.squared_distances(x_ND, y_KD)
    assert d2_NK.dtype == np.float32 and (d2_NK >= 0).all()
    assert d2_NK == pytest.approx(expected_NK, rel=1e-5, abs=1e-5 * scale**2)
    assert (kmeans.squared_distances(x_ND[:99], x_ND[:99]) >= 0).all()


def test_squared_distances_of_long_vectors_do_not_cancel():
    x_ND = np.array([[1e4, 0], [1e4, 0.25]], dtype=np.float32)
    assert kmeans.squared_distances(x_ND, x_ND).tolist() == [[0, 0.0625], [0.0625, 0]]


@QUICK
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 9), st.integers(1, 70))
def test_assign_is_the_argmin_for_any_chunks_and_any_order_of_clusters(seed, n, k, chunk_rows):
    rng = np.random.default_rng(seed)
    x_ND, centres_KD = (
        rng.standard_normal((n, 3), dtype=np.float32),
        rng.standard_normal((k, 3), dtype=np.float32),
    )
    prices_K = rng.standard_normal(k)
    d2_NK = kmeans.squared_distances(x_ND, centres_KD)
    labels_N, d2_N = kmeans.assign(x_ND, centres_KD, prices_K, chunk_rows)
    assert labels_N.dtype == np.int32 and d2_N.dtype == np.float32
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (d2_N == d2_NK[np.arange(n), labels_N]).all()
    order_K = rng.permutation(k)
    assert (order_K[kmeans.assign(x_ND, centres_KD[order_K], prices_K[order_K])[0]] == labels_N).all()


def test_assign_gives_ties_to_the_lowest_index():
    centres_KD = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    assert kmeans.assign(np.zeros((2, 2), np.float32), centres_KD, np.zeros(3))[0].tolist() == [0, 0]
    assert kmeans.assign(np.zeros((2, 2), np.float32), centres_KD, np.array([0.5, 0.0, 0.0]))[0].tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_vectors_that_are_not_finite_are_refused_by_row(value):
    x_ND = np.ones((9, 2), np.float32)
    x_ND[7, 1] = value
    with pytest.raises(ValueError, match=r"^vectors: row 7 is not finite"):
        kmeans.fit(x_ND, 2, **FITTED)
    with pytest.raises(ValueError, match=r"^vectors: row 7 is not finite"):
        kmeans.assign(x_ND, x_ND[:2], np.zeros(2), chunk_rows=4)


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf])
def test_weights_that_are_not_positive_are_refused(weight):
    with pytest.raises(ValueError, match=r"^weights: .* in row 2\. Expected positive"):
        kmeans.fit(np.eye(3, dtype=np.float32), 2, weights_N=np.array([1, 1, weight]), **FITTED)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7, 12])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 8, 11, 12, 13, 4001])
def test_every_n_and_k(n, k, balanced):
    rng = np.random.default_rng(n)
    x_ND, weights_N = rng.standard_normal((n, 4), dtype=np.float32), rng.integers(1, 99, n).astype(float)
    if k > n:
        with pytest.raises(
            ValueError, match=rf"^cluster\.k: {k}\. Expected at most {n}, the number of documents\. Lower"
        ):
            kmeans.fit(x_ND, k, balanced=balanced, **FITTED)
        return
    found = kmeans.fit(x_ND, k, balanced=balanced, **FITTED)
    check(found, x_ND, k)
    if balanced:
        assert found.loads_K.max() - found.loads_K.min() <= 1
    check(kmeans.fit(x_ND, k, weights_N=weights_N, balanced=balanced, **FITTED), x_ND, k, weights_N)


def test_k_below_1_is_refused():
    with pytest.raises(ValueError, match=r"^cluster\.k: 0\. Expected at least 1"):
        kmeans.fit(np.ones((3, 2)), 0, **FITTED)


@QUICK
@given(
    st.integers(0, 999),
    st.integers(1, 60),
    st.integers(1, 8),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_small_inputs_with_ties_and_duplicates(seed, n, k, d, lattice, weighted, balanced):
    rng = np.random.default_rng(seed)
    x_ND = (rng.integers(-1, 2, (n, d)) * 1.0 if lattice else rng.standard_normal((n, d))).astype(np.float32)
    weights_N = np.ceil(rng.lognormal(2, 2, n)) if weighted else None
    most = len(np.unique(x_ND, axis=0)) if k <= n else n
    if k > most:
        with pytest.raises(ValueError, match=rf"^cluster\.k: {k}\. Expected at most {most}, the number of "):
            kmeans.fit(x_ND, k, weights_N=weights_N, balanced=balanced, **FITTED)
    else:
        check(kmeans.fit(x_ND, k, weights_N=weights_N, balanced=balanced, **FITTED), x_ND, k, weights_N)


@QUICK
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 6))
def test_the_balanced_assignment_is_optimal(seed, per_cluster, k):
    rng = np.random.default_rng(seed)
    d2_NK = rng.random((per_cluster * k, k), dtype=np.float32)
    labels_N, prices_K = transport.balance(d2_NK, np.ones(len(d2_NK)), rng.standard_normal(k))
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (np.bincount(labels_N) == per_cluster).all()
    rows, columns = linear_sum_assignment(np.repeat(d2_NK, per_cluster, axis=1))
    assert d2_NK[np.arange(len(d2_NK)), labels_N].sum() == pytest.approx(
        d2_NK[rows, columns // per_cluster].sum(), rel=1e-5
    )


def test_the_balanced_assignment_is_optimal_where_clusters_have_no_common_border():
    """Few tight topics and more clusters: most pairs of clusters have no documents between them that could guide the prices."""
    x_ND, _ = mixture(1600, 20, 5, 0, spread=10)
    d2_NK = kmeans.squared_distances(x_ND, x_ND[:16])
    labels_N, prices_K = transport.balance(d2_NK, np.ones(1600), np.zeros(16))
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (np.bincount(labels_N) == 100).all()
    rows, columns = linear_sum_assignment(np.repeat(d2_NK, 100, axis=1))
    assert d2_NK[np.arange(1600), labels_N].sum() == pytest.approx(
        d2_NK[rows, columns // 100].sum(), rel=1e-5
    )


def test_prices_of_a_sample_save_moves(monkeypatch):
    x_ND, _ = mixture(3200, 20, 5, 0, spread=10)
    d2_NK = kmeans.squared_distances(x_ND, x_ND[:16])
    moves = []
    shortest_paths = transport._shortest_paths
    monkeypatch.setattr(
        transport, "_shortest_paths", lambda *args: moves.append(args) or shortest_paths(*args)
    )
    transport.balance(d2_NK, np.ones(3200), np.zeros(16))
    assert 0 < len(moves) < 300  # 1032 from the prices that the Newton steps alone reach


def test_no_cluster_stays_empty_where_the_next_document_weighs_nearly_nothing():
    x_ND = np.array([[-1.1], [-1], [0], [1], [1.1]], dtype=np.float32)
    d2_NK = kmeans.squared_distances(x_ND, np.array([[-1], [1.1], [0.1]], dtype=np.float32))
    mass_N, prices_K = np.array([0.5, 0.5, 1e-14, 0.5, 0.5]), np.array([0, 0, 9.0])
    labels_N, prices_K = transport._even_out(d2_NK, mass_N, (d2_NK + prices_K).argmin(axis=1), prices_K)
    assert set(labels_N) == {0, 1, 2}
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(2, 5), st.sampled_from([0.0, 0.02, 0.5]))
def test_the_duality_gap_bounds_what_any_assignment_could_gain(seed, k, off):
    x_ND, weights_N = mixture(40, 4, 6, seed)
    found = kmeans.fit(x_ND, k, weights_N=weights_N, **FITTED)
    prices_K = found.prices_K + off * np.random.default_rng(seed).standard_normal(k)
    labels_N, d2_N = kmeans.assign(x_ND, found.centres_KD, prices_K)
    loads_K, inertia = np.bincount(labels_N, weights_N, k), float(weights_N @ d2_N)
    gap = kmeans.duality_gap(loads_K, prices_K, inertia)
    assert off or gap == found.duality_gap
    costs_NK = weights_N[:, None] * kmeans.squared_distances(x_ND, found.centres_KD)
    every_document_once = np.kron(np.eye(40), np.ones(k))
    loads = np.kron(weights_N, np.eye(k))
    best = linprog(
        costs_NK.ravel(),
        A_eq=every_document_once,
        b_eq=np.ones(40),
        A_ub=np.concatenate([loads, -loads]),
        b_ub=np.concatenate([np.full(k, loads_K.max()), np.full(k, -loads_K.min())]) + 1e-6,
    )
    assert best.success
    assert inertia * (1 - gap) <= best.fun * (1 + 1e-5) <= inertia * (1 + 2e-5)


@QUICK
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-2, 2)), min_size=1, max_size=9), st.floats(-1, 1))
def test_the_duality_gap_is_a_share_and_knows_only_differences_of_prices(clusters, shift):
    loads_K, prices_K = np.array(clusters).T
    gap, shifted = (kmeans.duality_gap(loads_K, p_K, 1e9) for p_K in (prices_K, prices_K + shift))
    assert 0 <= gap <= 1 and shifted == pytest.approx(gap, abs=1e-9)
    assert kmeans.duality_gap(np.full(len(loads_K), 7.0), prices_K, 1e9) == pytest.approx(0, abs=1e-15)
    by_price_K = np.sort(prices_K)
    assert (
        kmeans.duality_gap(np.sort(loads_K), by_price_K, 1e9)
        <= kmeans.duality_gap(np.sort(loads_K)[::-1], by_price_K, 1e9) + 1e-9
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_balance_by_documents(seed):
    x_ND, _ = mixture(4000, 30, 25, seed)
    found = kmeans.fit(x_ND, 16, **FITTED)
    check(found, x_ND, 16)
    assert (found.loads_K == 250).all()
    assert found.duality_gap < 1e-12
    plain = kmeans.fit(x_ND, 16, balanced=False, **FITTED)
    assert plain.balance > 1.3 and plain.inertia < found.inertia < 1.1 * plain.inertia


@pytest.mark.parametrize("seed", [0, 1])
def test_balance_by_tokens(seed):
    x_ND, weights_N = mixture(6000, 30, 25, seed)
    found = kmeans.fit(x_ND, 8, weights_N=weights_N, **FITTED)
    check(found, x_ND, 8, weights_N)
    assert 0.99 < found.min_balance < found.balance < 1.01
    assert 0 < found.duality_gap < 2e-3
    by_documents = kmeans.fit(x_ND, 8, **FITTED)
    assert np.bincount(by_documents.labels_N, weights_N).max() > 1.01 * weights_N.sum() / 8


def test_prices_balance_documents_that_were_not_fitted():
    x_ND, _ = mixture(12000, 30, 25, 0)
    found = kmeans.fit(x_ND[:6000], 8, **FITTED)
    sizes_K = np.bincount(kmeans.assign(x_ND[6000:], found.centres_KD, found.prices_K)[0])
    nearest_K = np.bincount(kmeans.assign(x_ND[6000:], found.centres_KD, np.zeros(8))[0])
    assert sizes_K.max() < 1.12 * 750 < nearest_K.max()


def test_without_balance_it_is_ordinary_k_means():
    x_ND, _ = mixture(2000, 10, 9, 0)
    found = kmeans.fit(x_ND, 6, balanced=False, rng_seed=0, n_init=8, max_iterations=100)
    check(found, x_ND, 6)
    assert not found.prices_K.any() and found.duality_gap == 0
    assert (found.labels_N == kmeans.squared_distances(x_ND, found.centres_KD).argmin(axis=1)).all()
    reference = -KMeans(6, n_init="auto", random_state=0).fit(x_ND).score(x_ND)
    assert found.inertia < 1.005 * reference / 2000


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("n_copies", [1, 3])
def test_planted_clusters_are_recovered(balanced, n_copies):
    rng = np.random.default_rng(0)
    planted_N = np.repeat(rng.permutation(np.arange(100) % 5), n_copies)
    x_ND = np.eye(5, 8, dtype=np.float32)[planted_N] + np.repeat(
        0.05 * rng.standard_normal((100, 8)), n_copies, axis=0
    ).astype(np.float32)
    found = kmeans.fit(x_ND, 5, balanced=balanced, **FITTED)
    assert len({(int(a), int(b)) for a, b in zip(planted_N, found.labels_N, strict=True)}) == 5
    means_KD = np.stack([x_ND[found.labels_N == j].mean(axis=0) for j in range(5)])
    assert found.centres_KD == pytest.approx(means_KD, abs=1e-6)


def test_the_same_inputs_give_the_same_result_in_any_order_of_documents():
    x_ND, _ = mixture(900, 10, 9, 0)
    first = kmeans.fit(x_ND, 6, **FITTED)
    assert same(first, kmeans.fit(x_ND, 6, **FITTED))
    assert not same(first, kmeans.fit(x_ND, 6, rng_seed=1, n_init=2, max_iterations=30))
    order_N = np.random.default_rng(0).permutation(900)
    again = kmeans.fit(x_ND[order_N], 6, **FITTED)
    assert (again.labels_N == first.labels_N[order_N]).all() and (again.prices_K == first.prices_K).all()


@pytest.mark.parametrize("balanced", [True, False])
def test_the_best_run_is_taken_and_progress_tells_of_each_iteration(balanced):
    x_ND, _ = mixture(600, 10, 9, 0)
    told: list[tuple[int, int, float, float]] = []
    found = kmeans.fit(
        x_ND,
        6,
        balanced=balanced,
        rng_seed=0,
        n_init=5,
        max_iterations=30,
        progress=lambda *what: told.append(what),
    )
    last_of_run = {run: (iteration, inertia, balance) for run, iteration, inertia, balance in told}
    assert (
        list(last_of_run) == [0, 1, 2, 3, 4] and len({inertia for _, inertia, _ in last_of_run.values()}) > 1
    )
    best, (n_iterations, inertia, balance) = min(last_of_run.items(), key=lambda item: item[1][1])
    assert found.inertia == pytest.approx(inertia, rel=1e-6)
    assert (found.n_iterations, found.balance) == (n_iterations, pytest.approx(balance))
    assert [iteration for run, iteration, *_ in told if run == best] == list(
        range(1, found.n_iterations + 1)
    ) and n_iterations < 30
    inertias = [inertia for run, _, inertia, _ in told if run == best]
    assert inertias == sorted(inertias, reverse=True)


def test_an_even_run_is_better_than_a_tight_one():
    x_ND, weights_N = mixture(40, 4, 5, 0)
    last_of_run = {}

    def tell(run: int, iteration: int, inertia: float, balance: float) -> None:
        last_of_run[run] = inertia, balance

    found = kmeans.fit(x_ND, 4, weights_N=weights_N, rng_seed=0, n_init=5, max_iterations=30, progress=tell)
    assert found.balance == pytest.approx(min(balance for _, balance in last_of_run.values()))
    assert found.inertia > 1.001 * min(inertia for inertia, _ in last_of_run.values())


def test_iterations_are_limited():
    x_ND, _ = mixture(600, 10, 9, 0)
    assert kmeans.fit(x_ND, 6, rng_seed=0, n_init=1, max_iterations=1).n_iterations == 1
    assert kmeans.fit(x_ND, 6, rng_seed=0, n_init=1, max_iterations=3).n_iterations == 3


def test_seeds_from_a_sample_are_as_good(monkeypatch):
    x_ND, weights_N = mixture(8000, 20, 12, 0)
    whole = kmeans.fit(x_ND, 4, weights_N=weights_N, **FITTED)
    monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 1000)
    sampled = kmeans.fit(x_ND, 4, weights_N=weights_N, **FITTED)
    check(sampled, x_ND, 4, weights_N)
    assert sampled.balance < 1.01 and sampled.inertia < 1.01 * whole.inertia
    assert not same(sampled, whole)


def test_duplicates_share_a_cluster_and_the_rest_is_even():
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((1000, 6), dtype=np.float32)
    x_ND[:600] = 0
    x_ND[300:600] *= -1  # -0 is 0
    found = kmeans.fit(x_ND, 5, **FITTED)
    check(found, x_ND, 5)
    assert len(set(found.labels_N[:600])) == 1
    # documents behind the duplicates, as seen from all other clusters, have to stay with them
    assert np.sort(found.loads_K) == pytest.approx([100, 100, 100, 100, 600], abs=5)


def test_one_huge_document_fills_a_cluster_and_the_rest_is_even():
    rng = np.random.default_rng(0)
    x_ND, weights_N = rng.standard_normal((401, 6), dtype=np.float32), np.ones(401)
    weights_N[7] = 1e6
    found = kmeans.fit(x_ND, 5, weights_N=weights_N, **FITTED)
    check(found, x_ND, 5, weights_N)
    assert np.sort(found.loads_K) == pytest.approx([100, 100, 100, 100, 1e6], abs=20)
    assert found.centres_KD[found.labels_N[7]] == pytest.approx(x_ND[7], abs=0.1)


@pytest.mark.parametrize("prices_K", [[0.0, 0.0, 0.0], [-9.0, 4.0, 5.0]])
def test_empty_clusters_are_moved_to_documents(prices_K):
    x_ND = np.random.default_rng(0).standard_normal((50, 2), dtype=np.float32)
    centres_KD = np.array([[0, 0], [0, 0], [99, 99]], dtype=np.float32)
    centres_KD, prices_K, labels_N, _ = kmeans._occupy(x_ND, np.ones(50), centres_KD, np.array(prices_K))
    assert set(labels_N) == {0, 1, 2}
    assert (labels_N == kmeans.assign(x_ND, centres_KD, prices_K)[0]).all()


def test_centres_that_coincide_end_in_two_clusters():
    """All documents tie between these two clusters at first, so no prices can separate them."""
    x_ND = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32)
    centres_KD, prices_K, _ = kmeans._lloyd(
        x_ND, np.ones(4), np.zeros((2, 2), np.float32), np.zeros(2), True, 9, lambda *_: None
    )
    assert np.bincount(kmeans.assign(x_ND, centres_KD, prices_K)[0], minlength=2).all()
