"""Clusters that follow labels: how labels are dealt, centres, and how documents get their cluster."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_corpus
from cbtm_pipeline.clustering import kmeans, labelled
from cbtm_pipeline.corpus.labels import Crossed

WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.floats(1, 1e6), min_size=1, max_size=30
)


@given(WEIGHTS, st.integers(1, 30))
def test_labels_are_dealt_evenly(weights: dict[str, float], k: int) -> None:
    if len(weights) < k:
        with pytest.raises(
            ValueError, match=rf"cluster.k: {k}. Expected at most {len(weights)}, the number of"
        ):
            labelled.deal(weights, k)
        return
    groups = labelled.deal(weights, k)
    assert groups.keys() == weights.keys() and set(groups.values()) == set(range(k))
    loads = np.zeros(k)
    for label, j in groups.items():
        loads[j] += weights[label]
    assert loads.max() <= loads.min() + max(weights.values()), "one label less would make it the lightest"
    assert labelled.deal(dict(reversed(weights.items())), k) == groups, "in whatever order they come"
    if len(weights) == k:
        assert [groups[label] for label in sorted(weights, key=lambda x: (-weights[x], x))] == list(range(k))


def test_too_many_values_are_no_labels() -> None:
    with pytest.raises(ValueError, match=r"corpus.label_field: 10001 values. Expected at most 10000 to make"):
        labelled.numbered({str(i): 1.0 for i in range(10_001)})


def vectors(n: int = 300) -> tuple[np.ndarray, np.ndarray, list[str]]:
    x_ND, n_tokens_N = made_corpus.unit_vectors(n, 8, 5, 0)
    return x_ND, n_tokens_N, [["a", "b", "", "c", "d"][i % 5] for i in range(n)]


def test_means_are_those_of_all_chunks() -> None:
    x_ND, weights_N, labels = vectors()
    groups = {"a": 1, "b": 0, "c": 1}
    whole = labelled.means([(x_ND, weights_N, labels)], groups, 3)
    cut = labelled.means([(x_ND[a:b], weights_N[a:b], labels[a:b]) for a, b in ((0, 7), (7, 300))], groups, 3)
    np.testing.assert_allclose(whole, cut, atol=1e-6)
    here = np.isin(labels, ["a", "c"])
    expected = (weights_N[here, None] * x_ND[here]).sum(axis=0) / weights_N[here].sum()
    np.testing.assert_allclose(whole[1], expected, atol=1e-6)
    assert not whole[2].any(), "a group without documents"


def test_by_label_the_label_decides_and_text_where_there_is_none() -> None:
    x_ND, weights_N, labels = vectors()
    groups = labelled.deal({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, 2)
    rule = labelled.Rule(labelled.means([(x_ND, weights_N, labels)], groups, 2), groups=groups)
    labels_N, d2_N = rule.assign(x_ND, labels, np.array([100.0, 0.0]))
    nearest_N, _ = kmeans.assign(x_ND, rule.centres_KD, np.zeros(2))
    for i, label in enumerate(labels):
        assert labels_N[i] == (groups[label] if label else nearest_N[i])
    np.testing.assert_allclose(d2_N, ((x_ND - rule.centres_KD[labels_N]) ** 2).sum(axis=1), atol=1e-5)


def test_by_label_and_text_the_vectors_of_a_label_come_closer_to_their_mean() -> None:
    x_ND, weights_N, labels = vectors()
    names = labelled.numbered(dict.fromkeys("abc", 1.0))
    means = dict(zip(names, labelled.means([(x_ND, weights_N, labels)], names, 3), strict=True))
    moved_ND = labelled.pulled(x_ND, labels, means)
    for i, label in enumerate(labels):
        expected = (x_ND[i] + means[label]) / 2 if label in means else x_ND[i]
        np.testing.assert_allclose(moved_ND[i], expected, atol=1e-6)


def test_by_label_and_text_clusters_agree_more_with_labels() -> None:
    rng = np.random.default_rng(0)
    topics, weights_N = rng.integers(4, size=400), np.ones(400)
    x_ND = rng.standard_normal((4, 8))[topics] + 1.2 * rng.standard_normal((400, 8))
    labels = [f"topic {topic}" for topic in topics]
    names = labelled.numbered(dict.fromkeys(labels, 1.0))
    means = dict(zip(names, labelled.means([(x_ND, weights_N, labels)], names, 4), strict=True))
    settings: Any = {"rng_seed": 0, "n_init": 2, "max_iterations": 50}
    agreements = []
    for vectors_ND in (x_ND, labelled.pulled(x_ND, labels, means)):
        crossed = Crossed(4)
        crossed.add(labels, kmeans.fit(vectors_ND, 4, **settings).labels_N)
        agreements.append(crossed.agreement()["nmi"])
    assert agreements[1] > agreements[0] + 0.1


def test_a_rule_is_read_as_it_was_stored() -> None:
    x_ND, _, labels = vectors()
    centres_KD = x_ND[:2]
    means = {"b": x_ND[3], "a": x_ND[4]}
    for rule in (
        labelled.Rule(centres_KD),
        labelled.Rule(centres_KD, groups={"a": 1, "b": 0, "c": 0, "d": 1}),
        labelled.Rule(centres_KD, None, means, x_ND[5:7], np.array([0.1, -0.1])),
    ):
        arrays, about = rule.stored() if rule.groups or rule.means else ({}, {})
        again = labelled.read({"centres_KD": centres_KD, **arrays}, {"labels": about} if about else {})
        found, expected = (r.assign(x_ND, labels, np.array([0.1, -0.1])) for r in (again, rule))
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
