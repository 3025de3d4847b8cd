"""The results of tasks side by side."""

from typing import Any

from cbtm_pipeline.mixture import task_table


def row(metric: str, value: float | None, stderr: float | None = 0.01) -> dict[str, Any]:
    return {
        "task": "topics",
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "n_shots": 4,
        "n_examples": 9,
    }


def test_models_stand_in_the_order_of_their_making() -> None:
    names = ["10", "ensemble-top1", "2", "dense-steps", "seed", "ensemble", "dense"]
    expected = ["seed", "dense", "dense-steps", "ensemble", "ensemble-top1", "2", "10"]
    assert task_table.order(names) == expected


def test_each_task_and_metric_has_a_row_and_each_model_a_column() -> None:
    rows = task_table.join({"0": [row("acc", 0.5)], "seed": [row("acc", 0.25), row("f1", None, None)]})
    assert [r["metric"] for r in rows] == ["acc", "f1"]
    lines = task_table.text(rows, ["seed", "0"]).splitlines()
    assert lines[0].split() == ["task", "metric", "shots", "examples", "seed", "expert", "0"]
    assert lines[2].split() == ["topics", "acc", "4", "9", "0.250", "±", "0.010", "0.500", "±", "0.010"]
    assert lines[3].split() == ["topics", "f1", "4", "9", "–", "–"]
