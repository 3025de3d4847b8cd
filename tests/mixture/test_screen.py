"""The fast nll of the filter is the exact one up to rounding; a sweep with it gives the same bits."""

import itertools

import numpy as np
import pytest

from cbtm_pipeline.mixture import ensemble, screen, sweep
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


@pytest.mark.parametrize(("rng_seed", "cached"), [(0, 1 << 14), (1, 24), (2, 1)])
def test_fast_and_exact_agree(rng_seed: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "CACHED", cached)
    held_out = made(rng_seed)
    values = itertools.product((1, 2, 4, 5, 6), GRID.temperature, GRID.epsilon, GRID.beta)
    settings = [Setting("filter", *value, hysteresis=1.0) for value in values]
    assert screen.holds(held_out, settings)
    chosen_D = ~screen.tied(held_out)
    assert chosen_D.sum() in (27, 28) and not chosen_D[:2].all()
    found = sum(screen.nlls(part, settings) for part in screen.parts(held_out, chosen_D))
    exact = [sweep.document_nll(held_out, setting)[chosen_D].sum() for setting in settings]
    assert found == pytest.approx(exact, abs=1e-3 * sweep.SAME * held_out.offsets[-1])


def test_weights_that_could_vanish_are_not_screened() -> None:
    held_out = made(3)
    assert not screen.holds(held_out, [Setting("filter", 2, 1e-3, 0.1, 1.0)])
    assert not screen.holds(held_out, [Setting("filter", 2, 0.1, 0.0, 1.0)])


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_sweep_gives_the_bits_of_one_that_evaluates_every_setting_exactly(
    n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, reported = made(4), made(5)
    fast = sweep.sweep(calibration, reported, GRID, n_threads)
    monkeypatch.setattr(screen, "holds", lambda *_: False)
    exact = sweep.sweep(calibration, reported, GRID)
    assert len(fast) == len(exact) > 16
    for a, b in zip(fast, exact, strict=True):
        assert a.setting == b.setting and a.calibration_nll == b.calibration_nll and a.passes == b.passes
        assert a.nll_D.tobytes() == b.nll_D.tobytes()


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
