"""Passes over vectors in float32, and k-means by passes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from cbtm_pipeline.base import threads
from cbtm_pipeline.clustering import distances, kmeans, lloyd


def made(n: int, k: int, rng_seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of length one, centres among them, and prices."""
    rng = np.random.default_rng(rng_seed)
    x_ND = rng.normal(size=(n, 12)).astype(np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND, x_ND[rng.choice(n, k)] + np.float32(0.1), rng.normal(size=k) * 0.2


@hypothesis_settings(deadline=None, max_examples=25)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 99))
def test_the_two_nearest_are_those_of_the_exact_distances(n: int, k: int, rng_seed: int) -> None:
    x_ND, centres_KD, prices_K = made(n, k, rng_seed)
    two = distances.two_nearest(torch.from_numpy(x_ND), centres_KD, prices_K)
    d2_NK = distances.squared_distances(x_ND, centres_KD)
    cost_NK, each = d2_NK + prices_K, np.arange(n)
    in_order_NK = np.sort(cost_NK, axis=1)
    np.testing.assert_allclose(cost_NK[each, two.first_N], in_order_NK[:, 0], atol=1e-5)
    np.testing.assert_allclose(two.d2_N, d2_NK[each, two.first_N], atol=1e-5)
    if k > 1:
        assert (two.first_N != two.second_N).all()
        np.testing.assert_allclose(cost_NK[each, two.second_N], in_order_NK[:, 1], atol=1e-5)
        np.testing.assert_allclose(two.margin_N, in_order_NK[:, 1] - in_order_NK[:, 0], atol=1e-5)
    else:
        assert np.isinf(two.margin_N).all()


def test_sums_per_cluster() -> None:
    x_ND, _, _ = made(3000, 1)
    labels_N, mass_N = (
        np.random.default_rng(1).integers(0, 6, 3000).astype(np.int32),
        np.random.default_rng(2).uniform(1, 5, 3000),
    )
    sums_KD = distances.sums(torch.from_numpy(x_ND), mass_N, labels_N, 7)
    expected = np.array([(mass_N[labels_N == j, None] * x_ND[labels_N == j]).sum(axis=0) for j in range(7)])
    np.testing.assert_allclose(sums_KD, expected, atol=1e-3)
    assert not sums_KD[6].any()


def passes(x_ND: np.ndarray, k: int) -> list[bytes]:
    """Results of all passes over these vectors."""
    _, centres_KD, prices_K = made(100, k)
    mass_N = np.random.default_rng(0).uniform(1, 9, len(x_ND))
    two = distances.two_nearest(torch.from_numpy(x_ND), centres_KD, prices_K)
    sums_KD = distances.sums(torch.from_numpy(x_ND), mass_N, two.first_N, k)
    return [a.tobytes() for a in (*two, sums_KD, distances.squared_distances(x_ND, centres_KD))]


@pytest.mark.parametrize("k", [1, 2, 32])
def test_the_number_of_threads_changes_no_bit(k: int) -> None:
    x_ND, _, _ = made(20_000, 1)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append(passes(x_ND, k))
        assert torch.get_num_threads() == n_threads
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("k", [1, 2, 32])
def test_the_place_in_memory_changes_no_bit(k: int) -> None:
    x_ND, _, _ = made(5000, 1)
    found = []
    for offset in (0, 4, 16, 32, 48):
        buffer = np.empty(x_ND.nbytes + 128, np.uint8)
        start = -buffer.ctypes.data % 64 + offset
        moved_ND = buffer[start : start + x_ND.nbytes].view(np.float32).reshape(x_ND.shape)
        moved_ND[:] = x_ND
        found.append(passes(moved_ND, k))
    assert all(other == found[0] for other in found)


def test_one_thread_holds_in_a_thread_that_has_not_computed_yet() -> None:
    def inside() -> int:
        with threads.one_thread():
            torch.linalg.qr(torch.ones(300, 100))
            return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(inside).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    weights_N, d2_N = rng.lognormal(5, 1, 200_000), rng.uniform(size=200_000).astype(np.float32)
    found = set()
    for n_threads in (1, 2, 4):
        with threadpool_limits(n_threads):
            found.add(distances.weighted_sum(weights_N, d2_N))
    assert len(found) == 1


@pytest.mark.parametrize("k", [2, 150, 400])
def test_the_number_of_threads_changes_no_bit_of_a_solution(k: int) -> None:
    rng = np.random.default_rng(0)
    a_KK, b_K = rng.uniform(size=(k, k)) + k * np.eye(k), rng.normal(size=k)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 4):
        torch.set_num_threads(n_threads)
        with threadpool_limits(n_threads):
            found.append(distances.solve(a_KK, b_K))
    torch.set_num_threads(before)
    np.testing.assert_allclose(a_KK @ found[0], b_K, atol=1e-12 * k)
    assert len({x_K.tobytes() for x_K in found}) == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_whose_distances_do_not_fit_are_clustered_as_well(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x_ND = (
        rng.normal(size=(20_000, 12))
        + 3 * rng.normal(size=(30, 12))[rng.choice(30, 20_000, p=rng.dirichlet(np.ones(30)))]
    )
    x_ND = (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)
    weights_N = rng.lognormal(5, 1, len(x_ND)) if weighted else None
    settings = {"weights_N": weights_N, "rng_seed": 0, "n_init": 2, "max_iterations": 30}
    exact = kmeans.fit(x_ND, 8, **settings)
    monkeypatch.setattr(lloyd, "DISTANCES", 8 * 5_000)
    monkeypatch.setattr(lloyd, "PASS_ROWS", 3_000)
    seen = []
    found = kmeans.fit(
        x_ND,
        8,
        **settings,
        progress=lambda run, iteration, inertia, balance: seen.append((iteration, inertia, balance)),
    )
    assert found.balance < 1.011 and exact.balance < 1.002
    assert found.inertia < 1.02 * exact.inertia
    assert found.duality_gap is not None and found.duality_gap < 0.01
    assert seen[-1][0] == found.n_iterations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_finds_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, _, _ = made(60_000, 1)
    monkeypatch.setattr(lloyd, "DISTANCES", 16 * 20_000)
    on_cpu, on_gpu = (
        kmeans.fit(x_ND, 16, rng_seed=0, n_init=2, max_iterations=20, device=device)
        for device in ("cpu", "cuda")
    )
    assert on_gpu.inertia == pytest.approx(on_cpu.inertia, rel=1e-3)
    assert on_gpu.balance < 1.011 > on_cpu.balance
    assert (on_gpu.labels_N == on_cpu.labels_N).mean() > 0.95


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 5000), st.integers(1, 9), st.sampled_from([1e-6, 1.0, 1e6]))
def test_squared_distances_are_accurate(seed: int, n: int, d: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x_ND, y_KD = (scale * rng.standard_normal((m, d), dtype=np.float32) for m in (n, 3))
    y_KD[0] = x_ND[0]
    expected_NK = np.square(x_ND[:, None].astype(np.float64) - y_KD).sum(axis=2)
    d2_NK = distances.squared_distances(x_ND, y_KD)
    assert d2_NK.dtype == np.float32 and (d2_NK >= 0).all()
    assert d2_NK == pytest.approx(expected_NK, rel=1e-5, abs=1e-5 * scale**2)
    assert (distances.squared_distances(x_ND[:99], x_ND[:99]) >= 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_length_of_a_vector_changes_no_distance_of_its_direction(scale: float) -> None:
    rng = np.random.default_rng(0)
    directions_ND = rng.standard_normal((50, 7))
    directions_ND /= np.linalg.norm(directions_ND, axis=1, keepdims=True)
    centres_KD = np.concatenate([directions_ND[:2], rng.standard_normal((3, 7))])
    s_ND = torch.from_numpy(scale * rng.uniform(0.1, 1, (50, 1)) * directions_ND)
    s_ND[9] = 0
    expected_NK = np.square(directions_ND[:, None] - centres_KD).sum(axis=2)
    expected_NK[9] = 1.5
    d2_NK = distances.directions_to_centres(s_ND, centres_KD, of_zero=1.5)
    assert d2_NK.dtype == np.float32 and (d2_NK >= 0).all()
    assert d2_NK == pytest.approx(expected_NK, rel=1e-6, abs=1e-12)


def test_squared_distances_of_long_vectors_do_not_cancel() -> None:
    x_ND = np.array([[1e4, 0], [1e4, 0.25]], dtype=np.float32)
    assert distances.squared_distances(x_ND, x_ND).tolist() == [[0, 0.0625], [0.0625, 0]]


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 9), st.integers(1, 70))
def test_assign_is_the_argmin_for_any_chunks_and_any_order_of_clusters(
    seed: int, n: int, k: int, chunk_rows: int
) -> None:
    rng = np.random.default_rng(seed)
    x_ND, centres_KD = (
        rng.standard_normal((n, 3), dtype=np.float32),
        rng.standard_normal((k, 3), dtype=np.float32),
    )
    prices_K = rng.standard_normal(k)
    d2_NK = distances.squared_distances(x_ND, centres_KD)
    labels_N, d2_N = distances.assign(x_ND, centres_KD, prices_K, chunk_rows)
    assert labels_N.dtype == np.int32 and d2_N.dtype == np.float32
    assert (labels_N == (d2_NK + prices_K).argmin(axis=1)).all()
    assert (d2_N == d2_NK[np.arange(n), labels_N]).all()
    order_K = rng.permutation(k)
    assert (order_K[distances.assign(x_ND, centres_KD[order_K], prices_K[order_K])[0]] == labels_N).all()


def test_assign_gives_ties_to_the_lowest_index() -> None:
    centres_KD = np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    x_ND = np.zeros((2, 2), np.float32)
    assert distances.assign(x_ND, centres_KD, np.zeros(3))[0].tolist() == [0, 0]
    assert distances.assign(x_ND, centres_KD, np.array([0.5, 0.0, 0.0]))[0].tolist() == [1, 1]
