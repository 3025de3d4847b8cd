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
    assert not any(r.setting.stays for r in results)
    tried = [(r.setting.router, r.setting.top_k, r.setting.temperature) for r in results]
    assert tried == list(itertools.product(["paper", "filter"], [1, 2, 3], [0.05, 0.5]))
    for setting, calibration_nll, nll_D, passes in results:
        assert len(nll_D) == 7
        settings = [setting]
        if setting.router == "filter":
            betas = GRID.beta if setting.top_k > 1 else [0.5]  # a single expert has nothing to share
            settings = [setting._replace(epsilon=e, beta=b) for e in GRID.epsilon for b in betas]
        nlls = {s: sweep.document_nll(calibration, s).sum() / calibration.offsets[-1] for s in settings}
        assert min(nlls, key=lambda s: nlls[s]) == setting
        assert calibration_nll == pytest.approx(nlls[setting], rel=1e-12)
        costs = sweep.document_costs(reported, setting)
        np.testing.assert_array_equal(costs.nll_D, sweep.document_nll(reported, setting))
        np.testing.assert_allclose(nll_D, costs.nll_D, rtol=1e-11)
        assert passes == costs.passes_D.sum() / reported.offsets[-1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_beta_has_no_effect_on_a_single_expert(top_k: int):
    documents = make_documents(5)
    found = [sweep.document_nll(documents, Setting("filter", top_k, 0.1, 0.1, beta)) for beta in (0.25, 1.0)]
    assert np.array_equal(found[0], found[1]) == (top_k == 1)


def test_the_sticky_set_has_the_fewest_passes_of_those_that_cost_at_most_1_percent():
    calibration, reported = make_documents(2, 30, 5), make_documents(3, 9, 5)
    mean_N1 = calibration.logprob_NK.mean(axis=1, keepdims=True)  # experts that hardly differ
    calibration = calibration._replace(logprob_NK=mean_N1 + (calibration.logprob_NK - mean_N1) / 8)
    grid = GRID._replace(
        routers=["filter", "paper"], top_k=[2, 5], hysteresis=[1, 1.1, 1.3], fix_after=[4, 9]
    )
    results = sweep.sweep(calibration, reported, grid)
    staying = [r for r in results if r.setting.stays]
    assert [(r.setting.router, r.setting.top_k, r.setting.fix_after is None) for r in staying] == [
        ("filter", 2, True),
        ("filter", 2, False),
    ]
    n_tokens = calibration.offsets[-1]
    plain = [Setting("filter", 2, t, e, b, 1.0) for t in (0.05, 0.5) for e in (0.01, 0.2) for b in (0.5, 1.0)]
    nll = {s: sweep.document_nll(calibration, s).sum() / n_tokens for s in plain}
    near = [s for s in plain if nll[s] <= min(nll.values()) + np.log(1.01)]
    sticky = {}
    for setting in [s._replace(hysteresis=h) for s in near for h in (1.1, 1.3)]:
        costs = sweep.document_costs(calibration, setting)
        if costs.nll_D.sum() / n_tokens <= min(nll.values()) + np.log(1.01):
            sticky[setting] = costs.passes_D.sum()
    assert len(sticky) > 1 and len(set(sticky.values())) > 1
    assert sticky[staying[0].setting] == min(sticky.values())
    fixed = [s._replace(fix_after=n) for s in near for n in (4, 9)]
    nlls = [sweep.document_nll(calibration, s).sum() / n_tokens for s in fixed]
    assert staying[1].setting == fixed[nlls.index(min(nlls))]
    assert staying[1].calibration_nll == min(nlls)
    assert [r.setting.stays for r in results[:4]] == [False, False, True, True]  # beside their own top_k


def test_there_is_no_sticky_set_where_each_costs_too_much():
    documents = make_documents(4, 30, 5)
    grid = GRID._replace(routers=["filter"], top_k=[1], hysteresis=[1e9])
    assert not any(r.setting.stays for r in sweep.sweep(documents, documents, grid))


def test_settings_do_not_depend_on_the_reported_documents():
    calibration = make_documents(0)
    chosen = [[r[:2] for r in sweep.sweep(calibration, make_documents(seed), GRID)] for seed in (1, 2)]
    assert chosen[0] == chosen[1]


def test_duplicates_are_dropped():
    grid = GRID._replace(routers=["paper", "paper"], top_k=[4, 3, 100], temperature=[0.1, 0.1])
    assert len(sweep.sweep(make_documents(0), make_documents(1), grid)) == 1


def test_best_is_the_first_of_lowest_calibration_nll():
    settings = [Setting("paper", k, t) for k in (1, 2) for t in (0.1, 0.2, 0.3)]
    results = [
        sweep.Result(s, nll, np.zeros(1), 1.0) for s, nll in zip(settings, [3, 2, 2, 5, 1, 4], strict=True)
    ]
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
    sizes = [len(block.d2_NK) for block in sweep.blocks(documents)]
    assert sum(sizes) == len(documents.d2_NK) and max(sizes) <= 29 and len(sizes) > 3
