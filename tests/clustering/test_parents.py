"""Clusters of clusters: equal groups, the same for the same inputs, and those that lie together."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.clustering import kmeans, labelled, parents

SETTINGS = {"rng_seed": 0, "n_init": 4, "max_iterations": 50}


def cost(centres_KD: np.ndarray, loads_K: np.ndarray, order: np.ndarray, n: int) -> float:
    """The sum over the groups of load times squared distance to the group's weighted mean."""
    total = 0.0
    for rows in np.split(order, n):
        x, w = centres_KD[rows].astype(float), loads_K[rows]
        mean = np.average(x, axis=0, weights=w)
        total += float((w * ((x - mean) ** 2).sum(axis=1)).sum())
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 10**6))
def test_groups_are_equal_and_in_the_order_of_their_first_clusters(n: int, c: int, rng_seed: int) -> None:
    rng = np.random.default_rng(rng_seed)
    centres_KD = rng.normal(size=(n * c, 3)).astype(np.float32)
    loads_K = rng.uniform(0.1, 9, n * c)
    order = parents.order(centres_KD, loads_K, n, **SETTINGS)
    assert sorted(order) == list(range(n * c)), "a permutation"
    groups = np.split(order, n)
    assert all((np.diff(group) > 0).all() for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert order.tobytes() == parents.order(centres_KD, loads_K, n, **SETTINGS).tobytes()
    costs = [cost(centres_KD, loads_K, rng.permutation(n * c), n) for _ in range(8)]
    assert cost(centres_KD, loads_K, order, n) <= np.median(costs) + 1e-6


def test_the_best_of_all_groupings_is_found_for_few_clusters() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        centres_KD, loads_K = rng.normal(size=(6, 2)).astype(np.float32), rng.uniform(1, 3, 6)
        order = parents.order(centres_KD, loads_K, 2, **{**SETTINGS, "n_init": 20})
        pairs = [
            np.array([*some, *sorted(set(range(6)) - {*some})])
            for some in itertools.combinations(range(6), 3)
        ]
        best = min(cost(centres_KD, loads_K, pair, 2) for pair in pairs)
        assert cost(centres_KD, loads_K, order, 2) == pytest.approx(best)


def test_clusters_that_lie_together_have_one_parent() -> None:
    near = np.array([[0, 0], [9, 9], [0, 1], [9, 8], [1, 0], [8, 9]], np.float32)
    assert parents.order(near, np.ones(6), 2, **SETTINGS).tolist() == [0, 2, 4, 1, 3, 5]


def test_centres_in_one_place_are_still_equal_groups() -> None:
    centres_KD = np.repeat(np.eye(2, dtype=np.float32), [5, 1], axis=0)
    assert sorted(parents.order(centres_KD, np.ones(6), 2, **SETTINGS)) == list(range(6))


@pytest.mark.parametrize("weighted", [True, False])
def test_other_numbers_change_nothing_else(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(400, 5)).astype(np.float32)
    weights_N = rng.integers(1, 40, 400).astype(float) if weighted else None
    found = kmeans.fit(x_ND, 6, weights_N=weights_N, rng_seed=0, n_init=1, max_iterations=20)
    order = np.array([3, 0, 5, 1, 2, 4])
    other = kmeans.renumbered(x_ND, weights_N, found, order)
    assert np.array_equal(order[other.labels_N], found.labels_N)
    assert np.array_equal(other.centres_KD, found.centres_KD[order])
    np.testing.assert_allclose(other.loads_K, found.loads_K[order])
    assert (other.inertia, other.balance) == pytest.approx((found.inertia, found.balance))


def test_labels_follow_their_clusters() -> None:
    assert labelled.renumbered({"a": 0, "b": 1, "c": 1, "d": 2}, [2, 0, 1]) == {
        "a": 1,
        "b": 2,
        "c": 2,
        "d": 0,
    }
