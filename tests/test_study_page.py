"""docs/study.md says what the stored metrics say."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cbtm_pipeline.ops import k_checks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks/study"))
        return importlib.import_module("write")


def test_the_page_is_that_of_the_stored_metrics(writer: ModuleType) -> None:
    study, of_demo = (writer.Study(ROOT / f"docs/study/{name}.json") for name in ("technical", "demo"))
    of_rerouting = json.loads((ROOT / "docs/study/rerouting.json").read_text("utf-8"))
    assert writer.write(study, of_demo, of_rerouting) == (ROOT / "docs/study.md").read_text("utf-8")
    assert writer.which_k.write(study) == (ROOT / "docs/which-k.md").read_text("utf-8")


def test_doctor_quotes_the_rule_of_the_page(writer: ModuleType) -> None:
    study = writer.Study(ROOT / "docs/study/technical.json")
    without, with_gain = writer.which_k.gains(study)
    most, fewest = writer.which_k.per_parameter(without[-1]), writer.which_k.per_parameter(with_gain[0])
    assert (round(most, 1), round(fewest)) == (k_checks.WITHOUT_GAIN, k_checks.WITH_GAIN)


@pytest.mark.parametrize(
    ("ci95", "found"),
    [([0.8, 0.9], "holds"), ([1.1, 1.2], "does not hold"), ([0.9, 1.1], "no clear difference")],
)
def test_a_claim_holds_if_its_whole_interval_lies_on_its_side(
    writer: ModuleType, ci95: list[float], found: str
) -> None:
    assert writer.claims.judged((1.0, ci95), "holds", "does not hold") == found


def test_three_seeds_have_a_row_with_the_interval_of_their_group(writer: ModuleType) -> None:
    study = writer.Study(ROOT / "docs/study/technical.json")
    for group in study.content["groups"]:
        group["ci95"] = None
    assert not any("random seeds" in line for line in writer.claims.claims(study))
    group = study.content["groups"][0]
    group |= {"runs": [study.runs[0]["run"]] * 3, "ratio": 0.9, "ci95": [0.8, 0.95]}
    (row,) = [line for line in writer.claims.claims(study) if "over 3 random seeds" in line]
    assert "| holds |" in row and "0.900 [0.800, 0.950]" in row


def test_each_seed_is_shown_against_the_dense_model_of_the_group(writer: ModuleType) -> None:
    study = writer.Study(ROOT / "docs/study/technical.json")
    run = next(run for run in study.runs if run["dense"] == "dense-large")
    ratio = run["headline"]["ratios"]["dense"]["ratio"]
    for group in study.content["groups"]:
        group["ci95"] = None
    study.content["groups"][0] |= {
        "runs": [run["run"]] * 3,
        "dense": "dense",
        "ratio": ratio,
        "ci95": [0.8, 0.95],
    }
    (row,) = [line for line in writer.claims.claims(study) if "over 3 random seeds" in line]
    assert f"over `dense`: {ratio:.3f}" in row and f"each {', '.join([f'{ratio:.3f}'] * 3)}" in row


def test_weights_stay_for_an_interval_of_their_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/study"))
    rerouting = importlib.import_module("rerouting")
    offsets = np.array([0, 5, 5, 7])
    logw_NK = np.arange(14.0).reshape(7, 2)
    rows = {1: [0, 1, 2, 3, 4, 5, 6], 2: [0, 0, 2, 2, 4, 5, 5], 9: [0, 0, 0, 0, 0, 5, 5]}
    for interval, row_N in rows.items():
        assert rerouting.held_weights(logw_NK, offsets, interval).tolist() == logw_NK[row_N].tolist()


def test_each_kind_of_model_is_judged_at_its_own_best_rate(writer: ModuleType) -> None:
    study = writer.Study(ROOT / "docs/study/technical.json")
    for of in writer.rates.tried(study):
        at, (ratio, ci95) = writer.rates.at_best(study, of)
        dense = [name for name in of.names if name not in ("dense-large", writer.rates.ENSEMBLE)]
        strongest = min(found[name] for found in of.perplexities.values() for name in dense)
        best = min(found[writer.rates.ENSEMBLE] for found in of.perplexities.values())
        assert ci95 is not None or at.count(" at ") == 2
        assert ratio == pytest.approx(best / strongest, rel=1e-3), (
            "the interval's ratio is that of the documents"
        )
