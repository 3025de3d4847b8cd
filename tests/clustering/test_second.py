"""The second round: balance by prices, equal bytes, and the best expert where nothing binds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.clustering import kmeans, second


def made(n: int, k: int, rng_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs in nats per token, of which one column is the lowest nearly everywhere, and numbers of tokens."""
    rng = np.random.default_rng(rng_seed)
    nll_NK = rng.gamma(9.0, 0.4, (n, k)).astype(np.float32)
    nll_NK[:, 0] -= 1
    return nll_NK, rng.integers(1, 60, n)


@settings(deadline=None, max_examples=40)
@given(st.integers(40, 300), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_each_document_goes_to_its_cheapest_expert_and_loads_are_even(
    n: int, k: int, rng_seed: int, by_tokens: bool
) -> None:
    nll_NK, n_tokens_N = made(n, k, rng_seed)
    weights_N = n_tokens_N if by_tokens else np.ones(n)
    labels_N, prices_K = second.assign(nll_NK, weights_N, balanced=True)
    assert np.array_equal(labels_N, (nll_NK + prices_K).argmin(axis=1))
    loads_K = np.bincount(labels_N, weights_N, k)
    assert np.ptp(loads_K) <= 2 * weights_N.max(), "a document or two"
    again = second.assign(nll_NK, weights_N, balanced=True)
    assert labels_N.tobytes() == again[0].tobytes() and prices_K.tobytes() == again[1].tobytes()


def test_without_balance_the_best_expert_has_the_document() -> None:
    nll_NK, n_tokens_N = made(200, 4, 0)
    labels_N, prices_K = second.assign(nll_NK, n_tokens_N, balanced=False)
    assert np.array_equal(labels_N, nll_NK.argmin(axis=1)) and not prices_K.any()


def test_centres_are_the_means_of_the_new_clusters_and_balance_costs_little() -> None:
    nll_NK, n_tokens_N = made(400, 3, 1)
    x_ND = np.random.default_rng(2).normal(size=(400, 5)).astype(np.float32)
    found = second.deal(x_ND, nll_NK, n_tokens_N, balanced=True)
    for j in range(3):
        here = found.labels_N == j
        mean = np.average(x_ND[here], axis=0, weights=n_tokens_N[here])
        np.testing.assert_allclose(found.centres_KD[j], mean, atol=1e-5)
    best = np.average(nll_NK.min(axis=1), weights=n_tokens_N)
    random = np.average(nll_NK.mean(axis=1), weights=n_tokens_N)
    assert best <= found.nll < random
    assert 0 <= found.duality_gap < 0.01


@pytest.mark.parametrize("left", [0, 300])
def test_documents_that_were_not_scored_are_balanced_by_their_text(left: int) -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(left, 4)).astype(np.float32)
    weights_N = rng.integers(1, 30, left).astype(float)
    centres_KD = rng.normal(size=(3, 4)).astype(np.float32)
    chunks = [(x_ND[:100], weights_N[:100]), (x_ND[100:], weights_N[100:])] if left else []
    prices_K = second.text_prices(lambda: chunks, centres_KD, balanced=True)
    if not left:
        assert not prices_K.any()
        return
    labels_N, _ = kmeans.assign(x_ND, centres_KD, prices_K)
    loads_K = np.bincount(labels_N, weights_N, 3)
    assert loads_K.max() / loads_K.mean() < 1.05
    assert not second.text_prices(lambda: chunks, centres_KD, balanced=False).any()
