"""The split for calibration, and what the sweep chooses on it."""

import itertools

import numpy as np
import pytest

from cbtm_pipeline.mixture import ensemble, sweep

ROUTE = {
    "routers": ["paper", "filter"],
    "top_k": [1, 2, 9],
    "temperature": [0.05, 0.5],
    "epsilon": [0.01, 0.2],
    "beta": [0.5, 1.0],
}


def make_part(rng_seed: int, n_documents: int = 12, n_experts: int = 3) -> HeldOut:
    rng = np.random.default_rng(rng_seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, n_documents))])
    shape = (offsets[-1], n_experts)
    return HeldOut(
        -rng.gamma(2.0, 2.0, shape).astype(np.float32), rng.uniform(0, 1, shape).astype(np.float32), offsets
    )


def test_calibration_takes_its_share_by_id_and_seed_alone():
    ids = [f"doc-{i}" for i in range(1000)]
    mask = heldout.calibration_documents(ids, 0.3, 0)
    assert mask.sum() == 300
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (heldout.calibration_documents([ids[i] for i in shuffled], 0.3, 0) == mask[shuffled]).all()
    assert 150 < (mask != heldout.calibration_documents(ids, 0.3, 1)).sum() < 600
    wider = heldout.calibration_documents(ids, 0.5, 0)
    assert (wider | ~mask).all()
    assert 50 < mask[:500].sum() < 250


@pytest.mark.parametrize(("n", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.3, 3)])
def test_both_sides_have_a_document(n, share, expected):
    assert heldout.calibration_documents(map(str, range(n)), share, 0).sum() == expected


@pytest.mark.parametrize("ids", [[], ["a"]])
def test_one_document_cannot_be_split(ids):
    with pytest.raises(ValueError, match=r"corpus\.eval: . held-out document\. Expected at least 2"):
        heldout.calibration_documents(ids, 0.5, 0)


def test_sweep_has_a_row_per_router_top_k_and_temperature_and_chooses_on_the_calibration_part():
    calibration, reported = make_part(0), make_part(1, 7)
    results = sweep.sweep(calibration, reported, ROUTE)
    told = [(r.setting.router, r.setting.top_k, r.setting.temperature) for r in results]
    assert told == list(itertools.product(["paper", "filter"], [1, 2, 3], [0.05, 0.5]))
    for setting, calibration_nll, nll_D in results:
        assert len(nll_D) == 7
        tried = (
            [setting._replace(epsilon=e, beta=b) for e in ROUTE["epsilon"] for b in ROUTE["beta"]]
            if setting.epsilon
            else [setting]
        )
        nlls = {s: sweep.document_nll(calibration, s).sum() / calibration.offsets[-1] for s in tried}
        assert min(nlls, key=lambda s: nlls[s]) == setting
        assert calibration_nll == nlls[setting]
        np.testing.assert_array_equal(nll_D, sweep.document_nll(reported, setting))


def test_settings_do_not_depend_on_the_reported_part():
    calibration = make_part(0)
    chosen = [[r[:2] for r in sweep.sweep(calibration, make_part(rng_seed), ROUTE)] for rng_seed in (1, 2)]
    assert chosen[0] == chosen[1]


def test_duplicates_are_dropped():
    route = {**ROUTE, "routers": ["paper", "paper"], "top_k": [4, 3, 100], "temperature": [0.1, 0.1]}
    assert len(sweep.sweep(make_part(0), make_part(1), route)) == 1


def test_best_is_the_first_of_lowest_calibration_nll():
    settings = [Setting("paper", k, t) for k in (1, 2) for t in (0.1, 0.2, 0.3)]
    results = [sweep.Result(s, nll, np.zeros(1)) for s, nll in zip(settings, [3, 2, 2, 5, 1, 4], strict=True)]
    assert sweep.best(results, lambda s: s.top_k) == [settings[1], settings[4]]
    assert sweep.best(results, lambda s: s.router) == [settings[4]]


@pytest.mark.parametrize("setting", [Setting("paper", 2, 0.1), Setting("filter", 2, 0.1, 0.05, 1.0)])
def test_blocks_bound_memory_and_change_nothing(setting, monkeypatch: pytest.MonkeyPatch):
    part = make_part(3)
    logw_NK = sweep.log_weights(part, setting)
    whole = -ensemble.document_sums(ensemble.mix(part.logprob_NK, logw_NK), part.offsets)
    for block in (1, 60, 10**9):
        monkeypatch.setattr(sweep, "BLOCK", block)
        np.testing.assert_array_equal(sweep.document_nll(part, setting), whole)
    monkeypatch.setattr(sweep, "BLOCK", 60)
    sizes = [len(block.d2_NK) for block in sweep._blocks(part)]
    assert sum(sizes) == len(part.d2_NK) and max(sizes) <= 29 and len(sizes) > 3
