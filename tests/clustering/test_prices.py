"""Prices for a whole corpus."""

import numpy as np
import pytest

from cbtm_pipeline.clustering import kmeans, prices


def continuous(n: int, k: int, rng_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rng_seed)
    return (
        rng.normal(size=(n, 5)).astype(np.float32),
        rng.lognormal(sigma=1, size=n),
        rng.normal(size=(k, 5)).astype(np.float32),
    )


@pytest.mark.parametrize(("k", "rng_seed"), [(2, 0), (5, 1), (16, 2), (40, 3)])
def test_refined_prices_balance_from_any_start(k: int, rng_seed: int) -> None:
    x_ND, weights_N, centres_KD = continuous(20_000, k, rng_seed)
    prices_K, balance = prices.refine(
        lambda: [(x_ND[:15_000], weights_N[:15_000]), (x_ND[15_000:], weights_N[15_000:])],
        centres_KD,
        np.zeros(k),
    )
    assert balance < 1.05
    labels_N = (np.square(x_ND[:, None].astype(float) - centres_KD).sum(axis=2) + prices_K).argmin(axis=1)
    loads_K = np.bincount(labels_N, weights_N, k)
    assert loads_K.max() / loads_K.mean() == pytest.approx(balance, rel=1e-3)


def test_good_prices_stay_and_bad_documents_do_no_harm() -> None:
    x_ND, weights_N, centres_KD = continuous(5000, 3, 4)
    prices_K, balance = prices.refine(lambda: [(x_ND, weights_N)], centres_KD, np.zeros(3))
    again_K, again = prices.refine(lambda: [(x_ND, weights_N)], centres_KD, prices_K)
    assert again_K is prices_K and again == balance
    weights_N[0] = 1e6  # nothing balances this
    unbalanced_K, worst = prices.refine(lambda: [(x_ND, weights_N)], centres_KD, prices_K)
    assert np.isfinite(unbalanced_K).all() and worst <= 3
    identical = np.zeros((50, 5), np.float32)
    _, worst = prices.refine(lambda: [(identical, np.ones(50))], centres_KD, prices_K)
    assert worst == pytest.approx(3)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_corpus_of_another_kind_is_balanced_too(by_tokens: bool) -> None:
    """Centres and prices come from clumps, but the corpus has none: its nearest centres are not balanced."""
    rng = np.random.default_rng(3)
    fitted_ND = rng.normal(size=(12, 10))[rng.choice(12, 3000)] + 0.3 * rng.normal(size=(3000, 10))
    clustering = kmeans.fit(fitted_ND.astype(np.float32), 12, rng_seed=0, n_init=2, max_iterations=20)
    other_ND = (rng.normal(size=(9000, 10)) * np.linspace(0.1, 1, 10)).astype(np.float32)
    weights_N = rng.lognormal(5, 1, 9000) if by_tokens else np.ones(9000)

    def largest(prices_K: np.ndarray) -> float:
        loads_K = np.bincount(kmeans.assign(other_ND, clustering.centres_KD, prices_K)[0], weights_N, 12)
        return float(loads_K.max() / loads_K.mean())

    chunks = [
        (other_ND[start : start + 1000], weights_N[start : start + 1000]) for start in range(0, 9000, 1000)
    ]
    prices_K, balance = prices.refine(lambda: chunks, clustering.centres_KD, clustering.prices_K)
    assert largest(clustering.prices_K) > 1.4 and largest(np.zeros(12)) > 1.4
    assert largest(prices_K) < 1.05
    assert balance == pytest.approx(largest(prices_K), abs=0.005)
