"""The state of a stage or an expert by its Slurm job, its failures and any content of its files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import made_status
from cbtm_pipeline import status
from cbtm_pipeline.ops import status_table
from cbtm_pipeline.slurm import events
from made_status import HOUR, job, last_time, look, say, submit


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See made_status.train."""
    out = tmp_path_factory.mktemp("status") / "results"
    made_status.train(out)
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(trained, tmp_path / "results")


# --- failures ---


@pytest.mark.parametrize(
    ("kind", "name", "log", "label"),
    [
        ("expert", "0", "train_expert/0.log", "expert 0"),
        ("expert", "dense-steps", "train_expert/dense-steps.log", "expert dense-steps"),
        ("stage", "fit_kmeans", "fit_kmeans.log", "fit_kmeans"),
    ],
)
def test_a_failed_rule_says_why(out, kind, name, log, label):
    say(out / "logs" / log, label, "x.npz: damaged.\nExpected better. Make it again.")
    row = look(out, name, kind=kind)
    assert (row.state, row.error) == ("failed", "x.npz: damaged. Expected better. Make it again.")
    assert f"{name}: x.npz: damaged. Expected better. Make it again.\n" in status_table.render(
        status.gather(out, None, 0.0)
    )
    began = (out / "logs" / log).stat().st_mtime + 1
    os.utime(out / "config.json", (began, began))  # the run was started again since
    assert look(out, name, kind=kind).error is None


def test_an_error_that_was_overcome_is_none(out):
    log = out / "logs/train_expert/0.log"
    say(log, "expert 0", "no luck")
    with log.open("a") as file:
        file.write("12:00:00 I expert 0     going on after step 6\n")
    assert look(out, "0").state == "stopped"


# --- Slurm ---


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (job("PENDING", "Resources"), ("waiting", "PENDING", "Resources", None)),
        (job("RUNNING", nodes="gpu1"), ("running", "RUNNING", None, "gpu1")),
        (job("COMPLETING", nodes="gpu1"), ("running", "COMPLETING", None, "gpu1")),
        (job("REQUEUE_HOLD"), ("waiting", "REQUEUE_HOLD", None, None)),
        (job("PREEMPTED", nodes="gpu1"), ("stopped", "PREEMPTED", None, "gpu1")),
        (job("FAILED", "NonZeroExitCode", "gpu1"), ("stopped", "FAILED", "NonZeroExitCode", "gpu1")),
        ({}, ("stopped", None, None, "gpu3")),  # forgotten by Slurm
        (None, ("unknown", None, None, "gpu3")),  # Slurm does not answer
    ],
    ids=lambda value: next(iter(value.values())).state if value and isinstance(value, dict) else str(value),
)
def test_states_of_a_job(out, queue, expected):
    submit(out, "expert-0", "submitted", "started")
    row = look(out, "0", queue)
    assert (row.state, row.job_state, row.reason, row.node) == expected
    assert row.job == "17"
    submit(out, "embed", "submitted", "started")
    row = look(out, "embed", queue, kind="stage")
    assert (row.state, row.job_state, row.reason, row.node) == expected


def test_without_slurm_a_training_still_runs_if_its_files_say_so(out):
    submit(out, "expert-0", "submitted", "started")
    assert look(out, "0", None, now=last_time(out) + 10).state == "running"
    assert (
        look(out, "0", job("PENDING"), now=last_time(out) + 10).state == "waiting"
    )  # preempted, its rows are of just now


def test_restarts_are_those_of_the_newest_work(out):
    submit(
        out, "expert-0", "submitted", "started", "started", "taken 0", fingerprint="f", record=False
    )  # trained, then deleted
    submit(out, "expert-0", "submitted", "started", fingerprint="of another config", record=False)
    assert look(out, "0").n_restarts == 0
    submit(out, "expert-0", "submitted")
    assert look(out, "0").n_restarts is None
    submit(out, "expert-0", "started", "ended 85", "started", "ended -9", "taken 1", "submitted", "started")
    assert look(out, "0").n_restarts == 2
    shutil.rmtree(out / "slurm/expert-0")
    folder = submit(out, "expert-seed", "submitted", "started", "ended 85", "started", "ended 0", "taken 0")
    (folder / "job.json").unlink()
    seed = look(out, "seed", {})
    assert (seed.state, seed.n_restarts, seed.job, seed.node) == ("done", 1, "17", "gpu3")


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["ended 1"], "failed"),
        (["ended 1", "taken 1"], "failed"),
        (["taken 1"], "failed"),  # sbatch refused it
        (["ended 85"], "stopped"),  # saved, and goes on
        (["ended -9"], "stopped"),  # killed, and started again in place
        (["ended 1", "submitted"], "stopped"),  # started anew since
        (["ended 0"], "stopped"),
    ],
)
def test_failures_by_events(out, kinds, state):
    folder = submit(out, "expert-0", "submitted", "started", *kinds)
    (folder / "17_0_log.out").touch()
    row = look(out, "0", {})
    assert (row.state, row.error) == (
        state,
        f"its job ended with an error, see {folder}/17_0_log.out" if state == "failed" else None,
    )
    began = last_time(out) + HOUR
    os.utime(out / "config.json", (began, began))
    assert look(out, "0", {}, began).state == "stopped"


def test_failure_by_the_result_of_this_job(out):
    folder = submit(out, "expert-0", "submitted", "started")
    result = {"token": "token", "status": 1, "error": "CUDA_VISIBLE_DEVICES: None on gpu1. Expected 2 GPUs."}
    events.write_json(folder / "result.json", result | {"token": "of an earlier job"})
    assert look(out, "0", {}).state == "stopped"
    events.write_json(folder / "result.json", result)
    assert look(out, "0", {}).error == result["error"]
    events.write_json(folder / "result.json", result | {"status": 0, "error": None})
    assert look(out, "0", {}).state == "stopped"


# --- any content of the files ---


@pytest.fixture(scope="module")
def all_files(trained, tmp_path_factory) -> Path:
    """Every file that is read is there."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("all") / "results")
    for name in ("expert-0", "embed", "score-1"):
        folder = submit(out, name, "submitted", "started", "ended 1")
        events.write_json(folder / "result.json", {"token": "token", "status": 1, "error": "x"})
    for name in ("embed.log", "train_expert/0.log", "score_expert/1.log"):
        (out / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "logs" / name).write_text("12:00:00 E embed        message\n")
    for name in (".lock", "work/0/.lock"):
        (out / name).write_text('{"host": "node1", "pid": 7}')
    return out


READ = [
    *(
        "config.json",
        ".lock",
        "work/0/.lock",
        "work/0/state/metrics.jsonl",
        "experts/seed/card.json",
        "experts/seed/metrics.jsonl",
    ),
    *(
        "slurm/expert-0/job.json",
        "slurm/expert-0/events.jsonl",
        "slurm/expert-0/result.json",
        "slurm/embed/events.jsonl",
    ),
    *("slurm/score-1/job.json", "logs/train_expert/0.log", "logs/embed.log", "logs/score_expert/1.log"),
]
KEYS = st.sampled_from(
    [
        "step",
        "loss",
        "time",
        "plan",
        "n_steps",
        "job_id",
        "token",
        "status",
        "error",
        "event",
        "node",
        "fingerprint",
    ]
)
WORDS = st.sampled_from(["started", "taken", "ended", "17", "token", "\x1b[2J", "two\nlines"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=9,
)
ROWS = st.lists(st.dictionaries(KEYS, JSON, max_size=8).map(json.dumps), max_size=5).map("\n".join)
GARBAGE = st.binary() | ROWS.map(str.encode) | JSON.map(lambda value: json.dumps(value).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_content_of_a_file_is_an_error(all_files, data):
    path = all_files / data.draw(st.sampled_from(READ))
    whole, before = path.read_bytes(), path.stat()
    content = data.draw(st.integers(0, len(whole)).map(lambda n: whole[:n]) | GARBAGE)
    queue = data.draw(st.sampled_from([None, {}, job("RUNNING", nodes="n" * 50), job("PENDING", "R" * 90)]))
    try:
        path.write_bytes(content)
        found = status.gather(all_files, queue, data.draw(st.sampled_from([0.0, before.st_mtime + 1, 4e9])))
        assert all(
            len(line) <= status_table.WIDTH and line.isprintable()
            for line in status_table.render(found).splitlines()
        )
        json.dumps([row._asdict() for row in found.rows], allow_nan=False)
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", READ)
def test_each_file_may_be_missing_or_a_folder(all_files, tmp_path, name):
    out = shutil.copytree(all_files, tmp_path / "results")
    whole = status_table.render(status.gather(out, {}, last_time(out)))
    (out / name).unlink()
    assert isinstance(status_table.render(status.gather(out, {}, 0.0)), str)
    (out / name).mkdir()
    assert isinstance(status_table.render(status.gather(out, {}, 0.0)), str)
    assert "expert 0: message" in whole


def test_without_a_config_there_is_still_something_to_see(out):
    (out / "config.json").write_text("{")
    submit(out, "expert-random-10", "submitted")
    submit(out, "expert-random-9", "submitted")
    submit(out, "expert-11", "submitted")
    found = status.gather(out, {}, 0.0)
    assert "config.json: unexpected" in found.notes[0]
    assert [row.name for row in found.rows if row.kind == "expert"] == [
        "seed",
        "0",
        "11",
        "random-9",
        "random-10",
    ]
    assert (look(out, "seed").step, look(out, "seed").n_steps) == (5, 5)
    assert (look(out, "0").step, look(out, "0").n_steps) == (6, None)
    (out / "config.json").unlink()
    assert "config.json: No such file" in status.gather(out, {}, 0.0).notes[0]


def test_a_config_that_cannot_be_read_and_nothing_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = status.gather(tmp_path, {}, 0.0)
    assert {row.state for row in found.rows} == {"waiting"}
    assert "train: missing" in found.notes[0]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_no_run_yet(tmp_path, make):
    out = tmp_path / "results"
    make(out)
    found = status.gather(out, None, 0.0)
    assert found.rows == []
    printed = " ".join(status_table.render(found).split())  # a long path wraps the line
    assert printed == f"{out}: no run yet. Expected config.json, which a run writes when it starts."
