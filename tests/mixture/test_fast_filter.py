"""The fast filter is the exact one up to rounding, and so is a sweep with it."""

import itertools

import numpy as np
import pytest

from cbtm_pipeline.mixture import ensemble, fast_filter, sweep
from cbtm_pipeline.mixture.routers import HeldOut, Setting

GRID = sweep.Grid(("filter", "paper"), (1, 2, 3, 9), (0.05, 0.5), (0.01, 0.1, 1.0), (0.25, 1.0), (1, 3), (4,))


def made(rng_seed: int, n_experts: int = 6, n_documents: int = 30) -> HeldOut:
    rng = np.random.default_rng(rng_seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 40, n_documents))])
    logprob_NK = -rng.gamma(2, 2, (offsets[-1], n_experts)).astype(np.float32)
    d2_NK = rng.uniform(0, 4, logprob_NK.shape).astype(np.float32)
    d2_NK[offsets[:-1][offsets[:-1] < offsets[-1]]] = 2.0  # no evidence yet
    d2_NK[: offsets[3]] = 2.0  # three documents without any
    return HeldOut(logprob_NK, d2_NK, offsets)


@pytest.mark.parametrize(
    ("rng_seed", "cached", "block"), [(0, 1 << 14, 1 << 22), (1, 24, 1 << 22), (2, 1, 1), (0, 99, 900)]
)
def test_fast_and_exact_agree(
    rng_seed: int, cached: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_filter, "CACHED", cached)
    monkeypatch.setattr(fast_filter, "BLOCK", block)
    held_out = made(rng_seed)
    chosen_D = ~fast_filter.tied(held_out)
    assert chosen_D.sum() in (27, 28) and not chosen_D[:2].all()
    parts = fast_filter.parts(held_out, chosen_D)
    chosen_D &= np.diff(held_out.offsets) > 0
    assert sorted(np.concatenate(parts)) == np.flatnonzero(chosen_D).tolist()
    for temperature in GRID.temperature:
        values = itertools.product((1, 2, 4, 5, 6), [temperature], GRID.epsilon, GRID.beta)
        settings = [Setting("filter", *value, hysteresis=1.0) for value in values]
        settings += [Setting("paper", top_k, temperature) for top_k in (1, 2, 4, 5, 6)]
        assert all(fast_filter.Spread.of(held_out).holds(setting) for setting in settings)
        for part in parts:
            found = fast_filter.costs(fast_filter.prepared(held_out, part), settings)
            for setting, (nll_D, passes_D) in zip(settings, found, strict=True):
                exact = sweep.document_costs(held_out, setting)
                np.testing.assert_allclose(nll_D, exact.nll_D[part], rtol=1e-11)
                np.testing.assert_array_equal(passes_D, exact.passes_D[part])


def test_a_part_has_at_most_its_block_or_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_filter, "BLOCK", 900)
    held_out = made(0)
    n_tokens_D = np.diff(held_out.offsets)
    parts = fast_filter.parts(held_out, np.ones(30, bool))
    assert len(parts) > 3 and max(map(len, parts)) > 3
    assert all(len(part) == 1 or 6 * n_tokens_D[part].sum() <= 900 for part in parts)


def test_weights_that_could_vanish_are_not_evaluated_fast() -> None:
    spread = fast_filter.Spread.of(made(3))
    assert spread.holds(Setting("filter", 2, 0.1, 0.1, 1.0))
    assert not spread.holds(Setting("filter", 2, 1e-3, 0.1, 1.0))
    assert not spread.holds(Setting("filter", 2, 0.1, 0.0, 1.0))
    wide = fast_filter.Spread(logprob=150, d2=0)  # a token may cost an expert twice as much as another
    assert wide.holds(Setting("filter", 2, 0.1, 0.1, 1.0))
    assert not wide.holds(Setting("filter", 2, 0.1, 0.1, 3.0))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_sweep_is_one_that_evaluates_every_setting_exactly(
    n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_filter, "CACHED", 60)
    calibration, reported = made(4), made(5)
    fast = [sweep.sweep(calibration, reported, GRID, n) for n in (n_threads, 2)]
    for a, b in zip(*fast, strict=True):
        assert a.nll_D.tobytes() == b.nll_D.tobytes() and a.calibration_nll == b.calibration_nll
    monkeypatch.setattr(fast_filter.Spread, "holds", lambda *_: False)
    exact = sweep.sweep(calibration, reported, GRID)
    assert len(fast[0]) == len(exact) > 16
    for a, b in zip(fast[0], exact, strict=True):
        assert a.setting == b.setting and a.passes == b.passes
        np.testing.assert_allclose(a.calibration_nll, b.calibration_nll, rtol=1e-11)
        np.testing.assert_allclose(a.nll_D, b.nll_D, rtol=1e-11)
    assert any((a.nll_D != b.nll_D).any() for a, b in zip(fast[0], exact, strict=True))  # another way


@pytest.mark.parametrize("n_experts", [2, 3, 7, 16])
def test_the_largest_are_those_of_a_stable_sort(n_experts: int) -> None:
    rng = np.random.default_rng(n_experts)
    value_KN = rng.integers(0, 5, (n_experts, 200)).astype(float)
    value_KN[rng.random(value_KN.shape) < 0.1] = -np.inf
    for top_k in range(1, n_experts + 1):
        first = np.argsort(-value_KN, axis=0, kind="stable")[:top_k]
        expected = np.zeros(value_KN.shape, bool)
        np.put_along_axis(expected, first, True, axis=0)
        assert (ensemble.largest(value_KN, top_k) == expected).all()
