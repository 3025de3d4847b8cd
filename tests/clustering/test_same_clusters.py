"""The same clusters, with the same numbers, for any number of cores, and for vectors moved by rounding."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import made_corpus
from cbtm_pipeline.clustering import kmeans, lloyd, prices, transport


@contextmanager
def cores(n: int) -> Iterator[None]:
    """Let torch and every BLAS use n threads."""
    before = torch.get_num_threads()
    try:
        with threadpool_limits(n):
            torch.set_num_threads(n)
            yield
    finally:
        torch.set_num_threads(before)


def fit(x_ND: np.ndarray, k: int, weights_N: np.ndarray, balanced: bool = True) -> kmeans.Clustering:
    return kmeans.fit(
        x_ND, k, weights_N=weights_N, balanced=balanced, rng_seed=0, n_init=2, max_iterations=30
    )


def content(found: kmeans.Clustering) -> tuple[object, ...]:
    values = vars(found).values()
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


def moved_by_one_ulp(x_ND: np.ndarray, row: int, column: int) -> np.ndarray:
    """The vectors with one value moved to the next float32."""
    x_ND = x_ND.copy()
    x_ND[row, column] = np.nextafter(x_ND[row, column], np.float32(2))
    return x_ND


def n_renumbered(a: kmeans.Clustering, b: kmeans.Clustering) -> int:
    """Documents whose cluster has another number."""
    return int((a.labels_N != b.labels_N).sum())


@pytest.mark.parametrize(("k", "balanced"), [(16, True), (16, False), (1, True)])
def test_another_number_of_cores_gives_the_same_clusters(k: int, balanced: bool) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(12_000, 40, 30, 0)
    found = []
    for n_cores in (1, 2, 4):
        with cores(n_cores):
            found.append(content(fit(x_ND, k, weights_N, balanced)))
    assert found[0] == found[1] == found[2]


def test_another_number_of_cores_gives_the_same_clusters_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(12_000, 40, 30, 0)
    monkeypatch.setattr(lloyd, "DISTANCES", 16 * 3000)
    monkeypatch.setattr(lloyd, "PASS_ROWS", 5000)
    found = []
    for n_cores in (1, 2, 4):
        with cores(n_cores):
            found.append(content(fit(x_ND, 16, weights_N)))
    assert found[0] == found[1] == found[2]


def test_another_number_of_cores_gives_many_clusters_the_same_prices() -> None:
    """From about 100 clusters on, a BLAS solves for the prices in several threads."""
    x_ND, weights_N = made_corpus.unit_vectors(12_000, 40, 30, 0)
    centres_KD, chunks = x_ND[:150], [(x_ND, weights_N)]
    d2_NK, zeros_K, found = kmeans.squared_distances(x_ND, centres_KD), np.zeros(150), []
    for n_cores in (1, 2, 4):
        with cores(n_cores):
            _, sample_K = transport.balance(d2_NK, weights_N, zeros_K, exact=False)
            corpus_K, _ = prices.refine(lambda: chunks, centres_KD, zeros_K)
            found.append((sample_K.tobytes(), corpus_K.tobytes()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("sampled", [False, True])
def test_one_ulp_in_one_vector_keeps_the_clusters(
    k: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(4000, 30, 40, 0)
    if sampled:
        monkeypatch.setattr(kmeans, "SAMPLE_ROWS", 200)
        monkeypatch.setattr(kmeans, "SAMPLE_PER_CLUSTER", 16)
    first, rng = fit(x_ND, k, weights_N), np.random.default_rng(1)
    for _ in range(5):
        changed = fit(moved_by_one_ulp(x_ND, int(rng.integers(4000)), int(rng.integers(30))), k, weights_N)
        assert n_renumbered(first, changed) <= 5
        assert changed.inertia == pytest.approx(first.inertia, rel=1e-5)


def test_ulps_in_all_vectors_keep_the_clusters() -> None:
    """Another machine rounds every vector in another way."""
    x_ND, weights_N = made_corpus.unit_vectors(4000, 30, 40, 0)
    directions_ND = np.random.default_rng(0).choice([-2, 2], x_ND.shape).astype(np.float32)
    changed = fit(np.nextafter(x_ND, directions_ND), 16, weights_N)
    assert n_renumbered(fit(x_ND, 16, weights_N), changed) <= 5


def test_one_ulp_in_a_copy_keeps_the_clusters() -> None:
    """The vector counted together with its copies before, and now it counts alone."""
    x_ND, weights_N = made_corpus.unit_vectors(4000, 30, 40, 0)
    x_ND[1000:1010] = x_ND[0]
    first = fit(x_ND, 16, weights_N)
    for row in (0, 1000, 1009):
        assert n_renumbered(first, fit(moved_by_one_ulp(x_ND, row, 3), 16, weights_N)) <= 40


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_are_numbered_by_their_first_documents(balanced: bool, seed: int) -> None:
    x_ND, weights_N = made_corpus.unit_vectors(2000, 20, 30, seed)
    for rng_seed in (0, 1):
        settings = {"balanced": balanced, "rng_seed": rng_seed, "n_init": 1, "max_iterations": 9}
        found = kmeans.fit(x_ND, 12, weights_N=weights_N, **settings)
        _, first_K = np.unique(found.labels_N, return_index=True)
        assert (np.diff(first_K) > 0).all()


def test_first_documents_far_into_the_corpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus is sorted by source, and its clusters first appear in different chunks."""
    monkeypatch.setattr(kmeans, "CHUNK_ROWS", 64)
    rng = np.random.default_rng(0)
    x_ND = np.eye(5, 8, dtype=np.float32)[np.repeat([3, 0, 4, 1, 2], 100)]
    x_ND += 0.05 * rng.standard_normal(x_ND.shape, dtype=np.float32)
    assert (fit(x_ND, 5, np.ones(500)).labels_N == np.repeat(np.arange(5), 100)).all()


def test_a_cluster_of_nothing_but_ties_keeps_its_document() -> None:
    """Document 1 ties between both clusters: numbered by first documents, one of them would be empty."""
    x_ND = np.array([[1], [0]], np.float32)
    state = lloyd.State(np.array([[-1], [1]], np.float32), np.zeros(2))
    assert kmeans.assign(x_ND, *state[:2])[0].tolist() == [1, 0]
    numbered = kmeans._numbered(x_ND, state)
    assert kmeans.assign(x_ND, *numbered[:2])[0].tolist() == [1, 0]


def test_a_sample_of_a_corpus_sorted_by_source_holds_all_sources_alike() -> None:
    x_ND = np.arange(40_000, dtype=np.float32)[:, None]  # a vector is its row, and a source is 4000 rows
    documents = kmeans._shuffled(x_ND, np.ones(40_000), 4, 0)
    assert documents.shares() == [4, 1]
    sampled = documents.sample(4)
    from_source = np.bincount(sampled.x_SD[:, 0].astype(int) // 4000)
    assert from_source.sum() == 10_000 and (sampled.mass_S == 1).all()
    assert (np.abs(from_source - 1000) < 4 * np.sqrt(1000 * 0.75)).all()
    assert np.sort(documents.sample(1).x_SD[:, 0]).tolist() == x_ND[:, 0].tolist()


def test_copies_in_a_sample_are_one_vector_with_the_weight_of_all() -> None:
    x_ND = (np.arange(40_000, dtype=np.float32) // 2)[:, None]
    documents = kmeans._shuffled(x_ND, np.arange(1.0, 40_001), 4, 0)
    every = documents.sample(1)
    assert len(every.x_SD) == 20_000
    assert (every.mass_S == 4 * every.x_SD[:, 0] + 3).all()
    part = documents.sample(4)
    assert 7500 < len(part.x_SD) < 10_000  # most vectors once, some with both copies
    assert part.mass_S.sum() == documents.weights_N[documents.rows_N[:10_000]].sum()


def test_draws_follow_their_odds() -> None:
    odds_N, n = np.array([1, 0, 2, 3, 4]), 20_000
    rng = np.random.default_rng(0)
    drawn = lloyd._draw(odds_N, rng.integers(1 << 64, size=5, dtype=np.uint64), n, rng)
    found_N, expected_N = np.bincount(drawn, minlength=5), n * odds_N / 10
    assert (np.abs(found_N - expected_N) <= 4 * np.sqrt(expected_N)).all()


def test_a_document_that_is_gone_changes_only_its_own_draws() -> None:
    rng = np.random.default_rng(0)
    odds_N, keys_N = rng.uniform(1, 9, 200), rng.integers(1 << 64, size=200, dtype=np.uint64)
    drawn, without = (
        lloyd._draw(odds_N[first:], keys_N[first:], 500, np.random.default_rng(1)) + first for first in (0, 1)
    )
    others = drawn != 0
    assert 0 < (~others).sum() < 20
    assert (without[others] == drawn[others]).all()
