"""The paired bootstrap on cases whose answer is known."""

import numpy as np
import pytest

from cbtm_pipeline.mixture import bootstrap


def test_ratio_weighs_tokens_not_documents():
    n_tokens_D = np.array([1, 9])
    nll_DS = np.array([[5.0, 1.0], [9.0, 9.0]])  # totals 14 and 10 over 10 tokens
    reference_D = np.array([1.0, 9.0])
    np.testing.assert_allclose(bootstrap.perplexity_ratio(nll_DS, reference_D, n_tokens_D), [np.exp(0.4), 1])


def test_two_documents_have_a_known_distribution():
    """Resamples hold a twice, both, or b twice, with probabilities 1/4, 1/2, 1/4: the interval is [a, b]."""
    nll_DS, reference_D = np.array([[12.0], [30.0]]), np.array([10.0, 20.0])
    interval = bootstrap.ratio_intervals(nll_DS, reference_D, np.array([10, 20]), 500, 0)
    np.testing.assert_allclose(interval, [[np.exp(0.2), np.exp(0.5)]])


def test_a_constant_excess_per_token_has_no_spread():
    n_tokens_D = np.arange(1, 50)
    reference_D = np.random.default_rng(0).gamma(2, 2, 49) * n_tokens_D
    interval = bootstrap.ratio_intervals(
        (reference_D + 0.3 * n_tokens_D)[:, None], reference_D, n_tokens_D, 200, 0
    )
    np.testing.assert_allclose(interval, np.exp([[0.3, 0.3]]), rtol=1e-12)


def test_an_identical_system_gets_exactly_one():
    reference_D = np.random.default_rng(0).gamma(2, 100, 333)
    nll_DS = np.stack([reference_D, 1.1 * reference_D, reference_D], axis=1)
    interval = bootstrap.ratio_intervals(nll_DS, reference_D, np.full(333, 17), 100, 0)
    assert interval[[0, 2]].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert (bootstrap.perplexity_ratio(nll_DS, reference_D, np.full(333, 17))[[0, 2]] == 1).all()


def test_equal_documents_give_the_normal_interval():
    rng = np.random.default_rng(1)
    n_documents, n_tokens = 2000, 50
    excess_D = rng.normal(-0.1, 0.5, n_documents)
    reference_D = rng.normal(150, 10, n_documents)
    interval = bootstrap.ratio_intervals(
        (reference_D + n_tokens * excess_D)[:, None], reference_D, np.full(n_documents, n_tokens), 4000, 0
    )
    half_width = 1.96 * excess_D.std() / np.sqrt(n_documents)
    np.testing.assert_allclose(
        np.log(interval[0]), excess_D.mean() + np.array([-half_width, half_width]), atol=0.05 * half_width
    )


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        n_tokens_D = rng.integers(20, 60, 100)
        nll_D = (rng.normal(-0.05, 0.2, 100) * n_tokens_D)[:, None]
        low, high = np.log(bootstrap.ratio_intervals(nll_D, np.zeros(100), n_tokens_D, 300, trial)[0])
        covered += low <= -0.05 <= high
    assert 180 <= covered <= 199


def test_pairing_makes_the_interval_narrow():
    """Two systems that differ by little on every document: hard documents are hard for both."""
    rng = np.random.default_rng(3)
    hardness_D = rng.normal(4, 1, 300) * 40
    system_D = hardness_D - 40 * rng.normal(0.05, 0.01, 300)
    low, high = bootstrap.ratio_intervals(system_D[:, None], hardness_D, np.full(300, 40), 500, 0)[0]
    assert high < 1 and high - low < 0.005


def test_systems_and_calls_share_their_resamples(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(4)
    nll_DS, reference_D, n_tokens_D = rng.gamma(2, 50, (30, 5)), rng.gamma(2, 50, 30), rng.integers(1, 99, 30)
    together = bootstrap.ratio_intervals(nll_DS, reference_D, n_tokens_D, 101, 7)
    alone = [bootstrap.ratio_intervals(nll_DS[:, [s]], reference_D, n_tokens_D, 101, 7)[0] for s in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert (bootstrap.ratio_intervals(nll_DS, reference_D, n_tokens_D, 101, 8) != together).all()

    monkeypatch.setattr(bootstrap, "CHUNK", 30 * 7)  # chunks bound the memory and must not change the numbers
    in_chunks = bootstrap.ratio_intervals(nll_DS, reference_D, n_tokens_D, 101, 7)
    np.testing.assert_array_equal(in_chunks, together)


def test_one_document_has_nothing_to_resample():
    interval = bootstrap.ratio_intervals(np.array([[3.0]]), np.array([2.0]), np.array([10]), 50, 0)
    np.testing.assert_allclose(interval, np.exp([[0.1, 0.1]]))
