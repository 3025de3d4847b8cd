"""`cbtm doctor` on the labels of a corpus."""

import json
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline import config
from cbtm_pipeline.ops import label_checks
from cbtm_pipeline.ops.facts import Facts
from changed_config import changed


def found(folder: Path, labels: list[Any], **keys: Any) -> list[tuple[str, str]]:
    """What the check says of documents with these values of the field `source`; None: without one."""
    rows = [{"id": i, "text": "a b"} | ({} if x is None else {"source": x}) for i, x in enumerate(labels)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = Facts([], None)
    usual = {"corpus__train": [str(folder / "a.jsonl")], "corpus__label_field": "source"}
    facts.config = config.validate(changed(**{**usual, **keys}))
    try:
        return list(label_checks.check_labels(facts))
    except ValueError as error:
        return [("FAIL", str(error))]


@pytest.mark.parametrize(
    ("labels", "keys", "level", "text"),
    [
        (["a", "b", None], {}, "ok", "labels: source has 2 values or more"),
        ([None, "", None], {}, "FAIL", "corpus.label_field: source: no document has it. Expected a field"),
        (["a"] * 9, {"corpus__label_field": "domian"}, "FAIL", "corpus.label_field: domian: no document has"),
        ([*"abcd", None], {"cluster__by": "label"}, "ok", "labels: source has 4 values or more"),
        ([*"abc", None], {"cluster__by": "label"}, "FAIL", "cluster.k: 4. Expected at most 3, the number of"),
        ([*"abc"], {"cluster__by": "label+text"}, "ok", "labels: source has 3 values or more"),
    ],
)
def test_doctor_finds_labels_that_a_run_would_refuse(
    tmp_path: Path, labels: list[Any], keys: dict[str, Any], level: str, text: str
) -> None:
    ((found_level, line),) = found(tmp_path, labels, **keys)
    assert found_level == level and line.startswith(text)


@pytest.mark.parametrize(
    ("keys", "level", "text"),
    [
        ({}, "FAIL", "corpus.label_field: source: no document has it."),
        ({"corpus__label_field": "domain"}, "ok", "labels: domain has 8 values"),
        (
            {"corpus__label_field": "domain", "cluster__by": "label", "cluster__k": 9},
            "FAIL",
            "cluster.k: 9. Expected at most 8,",
        ),
    ],
)
def test_doctor_knows_the_labels_of_the_demo_before_it_is_made(
    tmp_path: Path, keys: dict[str, Any], level: str, text: str
) -> None:
    ((found_level, line),) = found(tmp_path, [], corpus__train=["builtin:demo"], **keys)
    assert found_level == level and line.startswith(text)


def test_doctor_adds_the_labels_of_the_demo_to_those_of_other_files(tmp_path: Path) -> None:
    train = ["builtin:demo", str(tmp_path / "a.jsonl")]
    keys = {"corpus__train": train, "cluster__by": "label", "cluster__k": 9}
    ((level, line),) = found(tmp_path, [None, "a"], corpus__label_field="source", **{**keys, "cluster__k": 1})
    assert level == "ok" and line.startswith("labels: source has 1 values")
    ((level, line),) = found(tmp_path, ["a"], corpus__label_field="domain", **keys)
    assert level == "FAIL" and line.startswith("cluster.k: 9. Expected at most 8")
    assert found(tmp_path, ["a"], corpus__label_field="id", **keys) == []


def test_doctor_says_nothing_of_labels_that_nobody_asks_for(tmp_path: Path) -> None:
    assert found(tmp_path, ["a"], corpus__label_field=None) == []


def test_doctor_reads_only_until_it_has_seen_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_checks, "LOOKED_BYTES", 10)
    monkeypatch.setattr(label_checks, "_PART_BYTES", 1 << 13)
    ((level, line),) = found(tmp_path, ["a"] * 2000 + ["b"], cluster__by="label", cluster__k=2)
    assert level == "warn" and "source has 1 values in the first" in line
