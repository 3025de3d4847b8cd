"""Soft borders: which documents are lent, to whom, and how many."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.clustering import borders


def made(n: int, k: int, rng_seed: int, *, by_label: bool = False) -> tuple[np.ndarray, borders.Border]:
    rng = np.random.default_rng(rng_seed)
    costs_NK = rng.random((n, k))
    own_N = rng.integers(k, size=n) if by_label else costs_NK.argmin(axis=1)
    return costs_NK, borders.border(costs_NK, own_N.astype(np.int32), rng.integers(1, 50, n))


@settings(max_examples=60)
@given(st.integers(1, 120), st.integers(2, 5), st.floats(0.01, 0.8), st.integers(0, 99), st.booleans())
def test_the_nearest_documents_are_lent_up_to_the_share(
    n: int, k: int, share: float, rng_seed: int, by_label: bool
) -> None:
    costs_NK, at = made(n, k, rng_seed, by_label=by_label)
    (lent_N,) = borders.lend([at], k, share)
    for j in range(k):
        borrowed, own = np.flatnonzero(lent_N == j), at.own_N == j
        assert not own[borrowed].any(), "no document is lent to its own cluster"
        n_own, n_borrowed = at.n_tokens_N[own].sum(), at.n_tokens_N[borrowed].sum()
        assert n_borrowed <= share * (n_own + n_borrowed) + 1e-9
        left = np.flatnonzero((at.second_N == j) & (lent_N != j))
        if len(left) and len(borrowed):
            assert at.gap_N[borrowed].max() <= at.gap_N[left].min()
        if len(left):
            more = n_borrowed + at.n_tokens_N[left[at.gap_N[left].argmin()]]
            assert more > share * (n_own + more) - 1e-9, "one more would be too many"
    for i in np.flatnonzero(lent_N >= 0):
        others = np.delete(costs_NK[i], at.own_N[i])
        assert costs_NK[i, lent_N[i]] == others.min(), "to the second cluster"
        assert np.isclose(at.gap_N[i], others.min() - costs_NK[i, at.own_N[i]])


def test_how_the_corpus_is_cut_into_shards_does_not_matter() -> None:
    _, at = made(100, 4, 0)
    cuts = [0, 30, 30, 77, 100]
    shards = [borders.Border(*(column[a:b] for column in at)) for a, b in itertools.pairwise(cuts)]
    parts = borders.lend(shards, 4, 0.2)
    assert [len(part) for part in parts] == [30, 0, 47, 23]
    assert np.array_equal(np.concatenate(parts), borders.lend([at], 4, 0.2)[0])
