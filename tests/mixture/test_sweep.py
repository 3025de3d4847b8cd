"""What the sweep tries, and what it chooses on the calibration documents."""

import itertools

import numpy as np
import pytest

from cbtm_pipeline.mixture import ensemble, sweep
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

GRID = sweep.Grid(
    routers=["paper", "filter"],
    top_k=[1, 2, 9],
    temperature=[0.05, 0.5],
    epsilon=[0.01, 0.2],
    beta=[0.5, 1.0],
)


def make_documents(rng_seed: int, n_documents: int = 12, n_experts: int = 3) -> HeldOut:
    rng = np.random.default_rng(rng_seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, n_documents))])
    shape = (offsets[-1], n_experts)
    logprob_NK = -rng.gamma(2.0, 2.0, shape).astype(np.float32)
    return HeldOut(logprob_NK, rng.uniform(0, 1, shape).astype(np.float32), offsets)


def test_sweep_has_a_result_per_router_top_k_and_temperature_and_chooses_on_the_calibration_documents():
    calibration, reported = make_documents(0), make_documents(1, 7)
    results = sweep.sweep(calibration, reported, GRID)
    tried = [(r.setting.router, r.setting.top_k, r.setting.temperature) for r in results]
    assert tried == list(itertools.product(["paper", "filter"], [1, 2, 3], [0.05, 0.5]))
    for setting, calibration_nll, nll_D in results:
        assert len(nll_D) == 7
        settings = [setting]
        if setting.router == "filter":
            settings = [setting._replace(epsilon=e, beta=b) for e in GRID.epsilon for b in GRID.beta]
        nlls = {s: sweep.document_nll(calibration, s).sum() / calibration.offsets[-1] for s in settings}
        assert min(nlls, key=lambda s: nlls[s]) == setting
        assert calibration_nll == nlls[setting]
        np.testing.assert_array_equal(nll_D, sweep.document_nll(reported, setting))


def test_settings_do_not_depend_on_the_reported_documents():
    calibration = make_documents(0)
    chosen = [[r[:2] for r in sweep.sweep(calibration, make_documents(seed), GRID)] for seed in (1, 2)]
    assert chosen[0] == chosen[1]


def test_duplicates_are_dropped():
    grid = GRID._replace(routers=["paper", "paper"], top_k=[4, 3, 100], temperature=[0.1, 0.1])
    assert len(sweep.sweep(make_documents(0), make_documents(1), grid)) == 1


def test_best_is_the_first_of_lowest_calibration_nll():
    settings = [Setting("paper", k, t) for k in (1, 2) for t in (0.1, 0.2, 0.3)]
    results = [sweep.Result(s, nll, np.zeros(1)) for s, nll in zip(settings, [3, 2, 2, 5, 1, 4], strict=True)]
    assert sweep.best(results, lambda s: s.top_k) == [settings[1], settings[4]]
    assert sweep.best(results, lambda s: s.router) == [settings[4]]


@pytest.mark.parametrize("setting", [Setting("paper", 2, 0.1), Setting("filter", 2, 0.1, 0.05, 1.0)])
def test_blocks_bound_memory_and_change_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    documents = make_documents(3)
    logw_NK = ROUTERS[setting.router].log_weights(documents, setting)
    whole = -ensemble.document_sums(ensemble.mix(documents.logprob_NK, logw_NK), documents.offsets)
    for block in (1, 60, 10**9):
        monkeypatch.setattr(sweep, "BLOCK", block)
        np.testing.assert_array_equal(sweep.document_nll(documents, setting), whole)
    monkeypatch.setattr(sweep, "BLOCK", 60)
    sizes = [len(block.d2_NK) for block in sweep._blocks(documents)]
    assert sum(sizes) == len(documents.d2_NK) and max(sizes) <= 29 and len(sizes) > 3
