"""Balanced k-means: certificates, edge cases, determinism."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sklearn.cluster import KMeans

import made_corpus
from cbtm_pipeline.clustering import kmeans

QUICK = settings(max_examples=40, deadline=None)
FITTED: dict[str, Any] = {"rng_seed": 0, "n_init": 2, "max_iterations": 30}


def check(found: kmeans.Clustering, x_ND: np.ndarray, k: int, weights_N: np.ndarray | None = None) -> None:
    """Check that a result agrees with `assign`, and that its certificate is right."""
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
    assert found.duality_gap is not None and 0 <= found.duality_gap <= 1


def same(a: kmeans.Clustering, b: kmeans.Clustering) -> bool:
    return all(
        (getattr(a, name) == getattr(b, name)).all() for name in ("centres_KD", "prices_K", "labels_N")
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_vectors_that_are_not_finite_are_refused_by_row(value: float) -> None:
    x_ND = np.ones((9, 2), np.float32)
    x_ND[7, 1] = value
    with pytest.raises(ValueError, match=r"^vectors: row 7 is not finite"):
        kmeans.fit(x_ND, 2, **FITTED)
    with pytest.raises(ValueError, match=r"^vectors: row 7 is not finite"):
        kmeans.assign(x_ND, x_ND[:2], np.zeros(2), chunk_rows=4)


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf])
def test_weights_that_are_not_positive_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"^weights: .* in row 2\. Expected positive"):
        kmeans.fit(np.eye(3, dtype=np.float32), 2, weights_N=np.array([1, 1, weight]), **FITTED)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("k", [1, 2, 7, 12])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 8, 11, 12, 13, 4001])
def test_every_n_and_k(n: int, k: int, balanced: bool) -> None:
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


def test_k_below_1_is_refused() -> None:
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
def test_small_inputs_with_ties_and_duplicates(
    seed: int, n: int, k: int, d: int, lattice: bool, weighted: bool, balanced: bool
) -> None:
    rng = np.random.default_rng(seed)
    x_ND = (rng.integers(-1, 2, (n, d)) * 1.0 if lattice else rng.standard_normal((n, d))).astype(np.float32)
    weights_N = np.ceil(rng.lognormal(2, 2, n)) if weighted else None
    most = len(np.unique(x_ND, axis=0)) if k <= n else n
    if k > most:
        with pytest.raises(ValueError, match=rf"^cluster\.k: {k}\. Expected at most {most}, the number of "):
            kmeans.fit(x_ND, k, weights_N=weights_N, balanced=balanced, **FITTED)
    else:
        check(kmeans.fit(x_ND, k, weights_N=weights_N, balanced=balanced, **FITTED), x_ND, k, weights_N)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(2, 5), st.sampled_from([0.0, 0.02, 0.5]))
def test_the_duality_gap_bounds_what_any_assignment_could_gain(seed: int, k: int, off: float) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(40, 4, 6, seed)
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
def test_the_duality_gap_is_a_share_and_knows_only_differences_of_prices(
    clusters: list[tuple[float, float]], shift: float
) -> None:
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
def test_balance_by_documents(seed: int) -> None:
    x_ND, _ = made_corpus.unit_vectors(4000, 30, 25, seed)
    found = kmeans.fit(x_ND, 16, **FITTED)
    check(found, x_ND, 16)
    assert (found.loads_K == 250).all()
    assert found.duality_gap is not None and found.duality_gap < 1e-12
    plain = kmeans.fit(x_ND, 16, balanced=False, **FITTED)
    assert plain.balance > 1.3 and plain.inertia < found.inertia < 1.1 * plain.inertia


@pytest.mark.parametrize("seed", [0, 1])
def test_balance_by_tokens(seed: int) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(6000, 30, 25, seed)
    found = kmeans.fit(x_ND, 8, weights_N=weights_N, **FITTED)
    check(found, x_ND, 8, weights_N)
    assert 0.99 < found.min_balance < found.balance < 1.01
    assert found.duality_gap is not None and 0 < found.duality_gap < 2e-3
    by_documents = kmeans.fit(x_ND, 8, **FITTED)
    assert np.bincount(by_documents.labels_N, weights_N).max() > 1.01 * weights_N.sum() / 8


def test_prices_balance_documents_that_were_not_fitted() -> None:
    x_ND, _ = made_corpus.unit_vectors(12000, 30, 25, 0)
    found = kmeans.fit(x_ND[:6000], 8, **FITTED)
    sizes_K = np.bincount(kmeans.assign(x_ND[6000:], found.centres_KD, found.prices_K)[0])
    nearest_K = np.bincount(kmeans.assign(x_ND[6000:], found.centres_KD, np.zeros(8))[0])
    assert sizes_K.max() < 1.12 * 750 < nearest_K.max()


def test_without_balance_it_is_ordinary_k_means() -> None:
    x_ND, _ = made_corpus.unit_vectors(2000, 10, 9, 0)
    found = kmeans.fit(x_ND, 6, balanced=False, rng_seed=0, n_init=8, max_iterations=100)
    check(found, x_ND, 6)
    assert not found.prices_K.any() and found.duality_gap == 0
    assert (found.labels_N == kmeans.squared_distances(x_ND, found.centres_KD).argmin(axis=1)).all()
    reference = -KMeans(6, n_init="auto", random_state=0).fit(x_ND).score(x_ND)
    assert found.inertia < 1.005 * reference / 2000


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("n_copies", [1, 3])
def test_planted_clusters_are_recovered(balanced: bool, n_copies: int) -> None:
    rng = np.random.default_rng(0)
    planted_N = np.repeat(rng.permutation(np.arange(100) % 5), n_copies)
    x_ND = np.eye(5, 8, dtype=np.float32)[planted_N] + np.repeat(
        0.05 * rng.standard_normal((100, 8)), n_copies, axis=0
    ).astype(np.float32)
    found = kmeans.fit(x_ND, 5, balanced=balanced, **FITTED)
    assert len({(int(a), int(b)) for a, b in zip(planted_N, found.labels_N, strict=True)}) == 5
    means_KD = np.stack([x_ND[found.labels_N == j].mean(axis=0) for j in range(5)])
    assert found.centres_KD == pytest.approx(means_KD, abs=1e-6)


def test_the_same_inputs_give_the_same_result() -> None:
    x_ND, _ = made_corpus.unit_vectors(900, 10, 9, 0)
    first = kmeans.fit(x_ND, 6, **FITTED)
    assert same(first, kmeans.fit(x_ND, 6, **FITTED))
    assert not same(first, kmeans.fit(x_ND, 6, rng_seed=1, n_init=2, max_iterations=30))


@pytest.mark.parametrize("balanced", [True, False])
def test_the_best_run_is_taken_and_progress_reports_each_iteration(balanced: bool) -> None:
    x_ND, _ = made_corpus.unit_vectors(600, 10, 9, 0)
    reports: list[tuple[int, int, float, float]] = []
    found = kmeans.fit(
        x_ND,
        6,
        balanced=balanced,
        rng_seed=0,
        n_init=5,
        max_iterations=30,
        progress=lambda *report: reports.append(report),
    )
    last_of_run = {run: (iteration, inertia, balance) for run, iteration, inertia, balance in reports}
    assert (
        list(last_of_run) == [0, 1, 2, 3, 4] and len({inertia for _, inertia, _ in last_of_run.values()}) > 1
    )
    best, (n_iterations, inertia, balance) = min(last_of_run.items(), key=lambda item: item[1][1])
    assert found.inertia == pytest.approx(inertia, rel=1e-6)
    assert (found.n_iterations, found.balance) == (n_iterations, pytest.approx(balance))
    assert [iteration for run, iteration, *_ in reports if run == best] == list(
        range(1, found.n_iterations + 1)
    ) and n_iterations < 30
    inertias = [inertia for run, _, inertia, _ in reports if run == best]
    assert inertias == sorted(inertias, reverse=True)


def test_an_even_run_is_better_than_a_tight_one() -> None:
    x_ND, weights_N = made_corpus.unit_vectors(40, 4, 5, 0)
    last_of_run = {}

    def report(run: int, iteration: int, inertia: float, balance: float) -> None:
        last_of_run[run] = inertia, balance

    found = kmeans.fit(x_ND, 4, weights_N=weights_N, rng_seed=0, n_init=5, max_iterations=30, progress=report)
    assert found.balance == pytest.approx(min(balance for _, balance in last_of_run.values()))
    assert found.inertia > 1.001 * min(inertia for inertia, _ in last_of_run.values())


def test_iterations_are_limited() -> None:
    x_ND, _ = made_corpus.unit_vectors(600, 10, 9, 0)
    assert kmeans.fit(x_ND, 6, rng_seed=0, n_init=1, max_iterations=1).n_iterations == 1
    assert kmeans.fit(x_ND, 6, rng_seed=0, n_init=1, max_iterations=3).n_iterations == 3


def test_seeds_from_a_sample_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(8000, 20, 12, 0)
    whole = kmeans.fit(x_ND, 4, weights_N=weights_N, **FITTED)
    monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 1000)
    sampled = kmeans.fit(x_ND, 4, weights_N=weights_N, **FITTED)
    check(sampled, x_ND, 4, weights_N)
    assert sampled.balance < 1.01 and sampled.inertia < 1.01 * whole.inertia
    assert not same(sampled, whole)


def test_duplicates_share_a_cluster_and_the_rest_is_even() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((1000, 6), dtype=np.float32)
    x_ND[:600] = 0
    x_ND[300:600] *= -1  # -0 is 0
    found = kmeans.fit(x_ND, 5, **FITTED)
    check(found, x_ND, 5)
    assert len(set(found.labels_N[:600])) == 1
    # documents behind the duplicates, as seen from all other clusters, have to stay with them
    assert np.sort(found.loads_K) == pytest.approx([100, 100, 100, 100, 600], abs=5)


def test_one_huge_document_fills_a_cluster_and_the_rest_is_even() -> None:
    rng = np.random.default_rng(0)
    x_ND, weights_N = rng.standard_normal((401, 6), dtype=np.float32), np.ones(401)
    weights_N[7] = 1e6
    found = kmeans.fit(x_ND, 5, weights_N=weights_N, **FITTED)
    check(found, x_ND, 5, weights_N)
    assert np.sort(found.loads_K) == pytest.approx([100, 100, 100, 100, 1e6], abs=20)
    assert found.centres_KD[found.labels_N[7]] == pytest.approx(x_ND[7], abs=0.1)
