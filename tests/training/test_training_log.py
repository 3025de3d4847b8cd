import pytest

import made_training as made
from cbtm_pipeline.training import training_log


def test_mfu(monkeypatch):
    monkeypatch.setattr(training_log, "_peak_flops", lambda: 1e12)
    progress = training_log.TrainingProgress(
        10, 0, n_tokens=1000, flops_per_token=6_000_000, every_s=1e9, n_devices=2
    )
    assert progress.mfu(1e5) == pytest.approx(0.3)
    with made.log_lines() as lines:
        assert progress.say(progress.complete({"step": 10, "loss": 1.0, "lr": 0.1, "data_wait_s": 0.0}))
    assert "  MFU " in lines[0]
    monkeypatch.setattr(training_log, "_peak_flops", lambda: None)
    assert training_log.TrainingProgress(10, 0, 1000, 6_000_000, 1e9, 2).mfu(1e5) is None


def test_the_first_row_of_a_start_says_where_it_runs():
    progress = training_log.TrainingProgress(10, 0, 1000, 6, 1e9, 1)
    rows = [progress.complete({"step": i, "loss": 1.0, "lr": 0.1, "data_wait_s": 0.0}) for i in (1, 2)]
    assert "thread" in rows[0]["machine"] and rows[0]["version"].startswith("cbtm-pipeline ")
    assert "machine" not in rows[1] and "version" not in rows[1]
