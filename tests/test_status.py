import importlib
import itertools
import json
import os
import pty
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import made_training as made
from cbtm_pipeline import config, status, train_expert
from cbtm_pipeline.ops import lenient, run_state, status_table
from cbtm_pipeline.ops.status_table import Row
from cbtm_pipeline.slurm import commands, events
from cbtm_pipeline.training import training_log

ROOT = Path(__file__).parents[1]
HOUR = 3600.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The seed is trained, expert 0 was stopped after step 6 of 10 (its state is of step 6), the others have
    not begun.
    """
    train_expert.make_deterministic(1)
    out = tmp_path_factory.mktemp("status") / "results"
    made.write_corpus(out)
    cfg = made.make_config(run=made.NOW)
    config.write(cfg, out / "config.json")
    made.train(cfg, files(out, "seed"), "seed")
    made.train(cfg, files(out, "0"), "0", made.stop_after(6))
    return out


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(trained, tmp_path / "results")


def files(out: Path, name: str) -> train_expert.Files:
    return made.files(out, name)._replace(work=out / "work" / name)


def rows_of(out: Path, name: str) -> list[training_log.Row]:
    return training_log.read(out / "work" / name / "state/metrics.jsonl")


def last_time(out: Path) -> float:
    return rows_of(out, "0")[-1]["time"]


def look(
    out: Path,
    name: str,
    queue: dict[str, commands.QueuedJob] | None = None,
    now: float | None = None,
    kind: str = "expert",
) -> Row:
    """One row; by default an hour after the last step."""
    rows = status.gather(out, queue, last_time(out) + HOUR if now is None else now).rows
    return next(row for row in rows if (row.kind, row.name) == (kind, name))


# --- experts without Slurm ----------------------------------------------------------------------------------


def test_a_finished_an_interrupted_and_a_waiting_expert(out):
    seed, zero, one = (look(out, name) for name in ("seed", "0", "1"))
    card = json.loads((out / "experts/seed/card.json").read_text())
    assert (seed.state, seed.step, seed.n_steps, seed.loss) == ("done", 5, 5, card["final_loss"])
    assert seed.tokens_per_s == statistics.median(
        row["tokens_per_s"] for row in training_log.read(out / "experts/seed/metrics.jsonl")
    )
    assert (zero.state, zero.step, zero.n_steps, zero.eta_s) == ("stopped", 6, 10, None)
    assert zero.loss == pytest.approx(statistics.fmean(row["loss"] for row in rows_of(out, "0")))
    newest = max(path.stat().st_mtime for path in (out / "work/0/state").glob("step-*.safetensors"))
    assert zero.saved_s == pytest.approx(last_time(out) + HOUR - newest)
    assert (one.state, one.step, one.n_steps, one.loss) == ("waiting", 0, 10, None)
    assert [row.name for row in status.gather(out, None, 0.0).rows if row.kind == "expert"] == [
        *("seed", "0", "1", "dense", "dense-steps", "random-0", "random-1")
    ]


def test_what_makes_a_training_running(out):
    now = last_time(out)
    lock = out / "work/0/.lock"
    assert look(out, "0", now=now + 10).state == "running"  # by its newest row
    assert look(out, "0", now=now + run_state.STALE_S + 1).state == "stopped"
    lock.write_text("")  # as a process that ends leaves it
    assert look(out, "0", now=now + 10).state == "stopped"
    lock.write_text('{"host": "node1", "pid": 7, "beat": 3}')
    os.utime(lock, (now + HOUR, now + HOUR))  # a step may take an hour, the lock shows that somebody is at it
    assert look(out, "0", now=now + HOUR + 10).state == "running"
    assert look(out, "0", now=now + HOUR + run_state.STALE_S + 1).state == "stopped"
    lock.rename(out / "work/0/.other")
    (out / "work/1").mkdir()
    (out / "work/0/.other").rename(out / "work/1/.lock")
    assert look(out, "1", now=now + HOUR + 10).state == "running"  # loading its model, no step yet


def test_time_to_go_is_not_bent_by_a_pause(out):
    path = out / "work/0/state/metrics.jsonl"
    times = [100.0, 102.0, 104.0, 1000.0, 1002.0, 1004.0]  # two seconds a step, a quarter of an hour away
    rows = [row | {"time": at} for row, at in zip(rows_of(out, "0"), times, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert look(out, "0", now=1004.0).eta_s == 8.0
    assert look(out, "0", now=1007.0).eta_s == 5.0
    assert look(out, "0", now=1100.0).eta_s == 0.0
    (out / "work/0/.lock").write_text('{"pid": 7}')
    os.utime(out / "work/0/.lock", (5000, 5000))
    assert look(out, "0", now=5001.0).eta_s == 8.0  # just started again


def test_an_expert_of_another_plan_or_without_weights_is_not_done(out):
    (out / "experts/seed/model.safetensors").rename(out / "weights")
    assert look(out, "seed").state == "waiting"
    (out / "weights").rename(out / "experts/seed/model.safetensors")
    assert look(out, "seed").state == "done"
    config.write(made.make_config(lr=0.02), out / "config.json")
    assert look(out, "seed").state == "waiting"


def test_mfu_is_shown_where_it_is_known(out):
    assert look(out, "0").mfu is None
    path = out / "work/0/state/metrics.jsonl"
    rows = [
        row | {"mfu": mfu}
        for row, mfu in zip(rows_of(out, "0"), [None, 0.1, 0.4, 0.41, 0.42, 0.43], strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert look(out, "0").mfu == 0.41
    assert "41.0 %" in status_table.render(status.gather(out, None, 0.0))


# --- stages -------------------------------------------------------------------------------------------------


def test_stages_are_the_rules_of_the_workflow():
    text = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    rules = dict(zip(*[iter(re.split(r"^rule (\w+):", text, flags=re.M)[1:])] * 2, strict=True))
    assert rules.keys() == {*status.OUTPUTS, "train_expert"}
    for rule, output in status.OUTPUTS.items():
        found = text if rule == "demo_corpus" else rules[rule]
        assert f'f"{{OUT}}/{output.replace("{}", "{{expert}}")}"' in found
        assert f'f"{{OUT}}/logs/{rule}{"/{{expert}}" if rule == "score_expert" else ""}.log"' in rules[rule]
    assert 'f"{OUT}/logs/train_expert/{{expert}}.log"' in rules["train_expert"]


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of `folder`."""
    code = "import sys; from cbtm_pipeline.base import lock; lock.hold(sys.argv[1]); print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_stages_of_a_local_run(out):
    def state(name: str) -> str:
        return look(out, name, now=now, kind="stage").state

    began = (out / "config.json").stat().st_mtime
    now = began + 60
    assert state("shard") == "done"
    log = out / "logs/embed.log"
    log.parent.mkdir()
    assert state("embed") == "waiting"
    log.write_text("12:00:00 I embed        vectors\n")
    assert state("embed") == "stopped"
    with holding(out) as process:
        now = (out / ".lock").stat().st_mtime + 1
        assert state("embed") == "running"
        assert status.gather(out, None, now).active == f"process {process.pid} on {socket.gethostname()}"
        os.utime(log, (began - 9, began - 9))  # of an earlier run: this one has not come to it
        assert state("embed") == "stopped"
        os.utime(log, (began + 9, began + 9))
        (out / "embed").mkdir()
        (out / "embed/manifest.json").touch()
        assert state("embed") == "done"
    assert status.gather(out, None, now).active is None


def test_stages_that_the_config_does_without_are_left_out(out):
    content = made.make_config().model_dump()
    assert {"demo_corpus", "assign_random"} <= {row.name for row in status.gather(out, None, 0.0).rows}
    content["corpus"]["train"], content["train"]["controls"] = ["mine.jsonl"], []
    config.write(config.validate(content), out / "config.json")
    rows = status.gather(out, None, 0.0).rows
    assert not {"demo_corpus", "assign_random"} & {row.name for row in rows}
    assert [row.name for row in rows if row.kind == "expert"] == ["seed", "0", "1", "dense"]


def test_scores_are_one_row(out):
    (out / "scores").mkdir()
    for name in ("seed", "1"):
        (out / f"scores/{name}.npz").touch()
    row = look(out, "score_expert", kind="stage")
    assert (row.state, row.step, row.n_steps) == ("waiting", 2, 7)
    say(out / "logs/score_expert/0.log", "score 0", "bad weights")
    row = look(out, "score_expert", kind="stage")
    assert (row.state, row.step, row.error) == ("failed", 2, "expert 0: bad weights")


# --- failures -----------------------------------------------------------------------------------------------


def say(log: Path, label: str, error: str) -> None:
    """What a rule's module leaves in its log when it fails."""
    code = """
import sys
from pathlib import Path
from cbtm_pipeline.base import cli

def main():
    cli.start_logging(sys.argv[1], Path(sys.argv[2]))
    cli.log.info("working")
    raise ValueError(sys.argv[3])

cli.run(main)
"""
    run = subprocess.run([sys.executable, "-c", code, label, log, error], capture_output=True, text=True)
    assert (run.returncode, "Traceback" in run.stderr) == (1, False)


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


# --- Slurm --------------------------------------------------------------------------------------------------


def job(state: str, reason: str = "None", nodes: str = "") -> dict[str, commands.QueuedJob]:
    return {"17": commands.QueuedJob("17", "expert-0", state, reason, nodes, 0, "token", "", "")}


def submit(
    out: Path, name: str, *kinds: str, job_id: str = "17", fingerprint: str = "f", record: bool = True
) -> Path:
    """The folder of a job with these events, as launch.py and task.py write them; "ended 1" is an ended with
    exit status 1.
    """
    folder = out / "slurm" / name
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        event, _, exit_status = kind.partition(" ")
        more: dict[str, Any] = {"status": int(exit_status)} if exit_status else {}
        more |= {"node": "gpu3"} if event in ("started", "ended") else {}
        events.add(folder, event, job_id=job_id, fingerprint=fingerprint, **more)
    if record:
        events.write_json(
            folder / "job.json",
            {"job_id": job_id, "name": name, "token": "token", "fingerprint": fingerprint},
        )
    return folder


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


# --- any content of the files -------------------------------------------------------------------------------


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
    assert (
        status_table.render(found)
        == f"{out}: no run yet. Expected config.json, which a run writes when it starts.\n"
    )


@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(1, 400), st.integers(0, 12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_end_of_a_log_is_its_newest_whole_rows(tmp_path, values, n_bytes, n_cut):
    lines = [json.dumps({"step": value}) + "\n" for value in values]
    text = "".join(lines)
    cut = text[: max(0, len(text) - n_cut)]
    path = tmp_path / "log.jsonl"
    path.write_text(cut)
    lengths = list(itertools.accumulate(map(len, lines)))
    # whole rows (a last one without its newline is whole, too) that begin after the first newline of what is
    # read
    begins = [0, *lengths]
    start = 0 if len(cut) <= n_bytes else next((b for b in begins if b > len(cut) - n_bytes), len(cut) + 1)
    expected = [
        {"step": v}
        for v, b, e in zip(values, begins, lengths, strict=False)
        if b >= start and e - 1 <= len(cut)
    ]
    assert lenient.rows(path, n_bytes) == expected


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (True, None),
        ("3", None),
        (None, None),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
def test_what_is_a_number(value, number):
    assert lenient.number(value) == number


def test_text_stays_on_its_line_and_moves_no_cursor():
    assert lenient.text("a\x1b[2Jb \n\tü") == "a [2Jb ü"
    assert lenient.text(17) == "17"
    assert lenient.text(None) is None


# --- how it looks -------------------------------------------------------------------------------------------


def test_a_wide_table_stays_within_its_width():
    widest = Row(
        *(
            "expert",
            "random-127",
            "running",
            123456,
            1234567,
            12.3456,
            12345678.9,
            0.9999,
            99 * HOUR,
            99 * HOUR,
        ),
        *("123456789012", "PENDING", "AssocGrpGRESMinutes", "gpu-a100-[1-128].example", 1234, "x" * 200),
    )
    rows = [widest, widest._replace(kind="stage", name="score_expert")] * 20
    lines = status_table.render(
        status.Status("results", "process 1 on " + "h" * 200, rows, ["n" * 300])
    ).splitlines()
    assert max(map(len, lines)) <= status_table.WIDTH


def test_columns_are_aligned_and_empty_ones_left_out():
    rows = [
        Row("expert", "seed", "done", 5, 5, 2.0),
        Row("expert", "random-10", "running", 10, 2000, 3.25, eta_s=75.0),
    ]
    table = status_table.render(status.Status("results", None, rows, [])).splitlines()
    assert table == [
        "results: no snakemake runs",
        "",
        "expert     state                 step   loss    ETA",
        "seed       done     ########      5/5  2.000",
        "random-10  running  ........  10/2000  3.250  1m15s",
        "",
        "2 experts: 1 done, 1 running. ETA: 1m15s",
    ]
    rows.append(Row("expert", "1", "waiting", 0, 2000))
    assert (
        status_table.summary(rows) == "3 experts: 1 done, 1 running, 1 waiting. ETA of those that run: 1m15s"
    )


def test_a_bar_is_full_only_at_the_end():
    bars = [status_table.bar(step, 100) for step in range(101)]
    assert [n.count("#") for n in bars] == sorted(n.count("#") for n in bars)
    assert (bars[0], bars[99], bars[100]) == ("........", "#######.", "########")
    assert status_table.bar(0, 0) == "########"  # a pretrained seed is not trained
    assert status_table.bar(9, 3) == "########"
    assert status_table.bar(3, None) == ""


# --- the command --------------------------------------------------------------------------------------------


def run(*args: object, cwd: Path, module: str = "cbtm_pipeline", **more: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], cwd=cwd, capture_output=True, text=True, **more
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_command_finds_the_run(out, tmp_path):
    other = shutil.copytree(out, tmp_path / "other")
    (other / "config.json").unlink()
    assert run("status", cwd=tmp_path).startswith("results: no snakemake runs\n")
    assert run(cwd=tmp_path, module="cbtm_pipeline.status").startswith("results: ")
    (tmp_path / "config.yaml").write_text("outdir: other\n")
    (tmp_path / "mine.yaml").write_text("outdir: results\n")
    (tmp_path / "steps.yaml").write_text("train: {steps: 3}\n")
    assert run("status", cwd=tmp_path).startswith("other: ")
    assert run("status", "--configfile", "mine.yaml", "steps.yaml", cwd=tmp_path).startswith("results: ")
    both = run("status", out, "nowhere", "--configfile", "mine.yaml", cwd=tmp_path)
    assert both.startswith(f"{out}: ")
    assert both.endswith(
        "\n\nnowhere: no run yet. Expected config.json, which a run writes when it starts.\n"
    )


def test_json_holds_everything(out, tmp_path):
    (found,) = json.loads(run("status", "--json", cwd=tmp_path))
    assert found["outdir"] == "results"
    zero = next(row for row in found["rows"] if row["name"] == "0")
    assert zero == {**look(out, "0")._asdict(), **{key: zero[key] for key in ("state", "saved_s", "eta_s")}}


def test_a_broken_configfile_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: [")
    command = [sys.executable, "-m", "cbtm_pipeline", "status", "--configfile", "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("mine.yaml: not YAML")


def test_a_machine_without_slurm_is_noted(out, tmp_path):
    assert "Slurm" not in run("status", cwd=tmp_path, env=os.environ | {"PATH": ""})
    submit(out, "expert-0", "submitted", "started")
    assert "\nThere is no Slurm on this machine" in run("status", cwd=tmp_path, env=os.environ | {"PATH": ""})


def test_the_reader_may_stop_reading(out, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "cbtm_pipeline", "status"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait() == 0


def test_colours_on_a_terminal_only(out, tmp_path):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")
    } | {"TERM": "xterm"}
    assert "\x1b" not in run("status", cwd=tmp_path, env=environment)
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "cbtm_pipeline", "status"],
        cwd=tmp_path,
        stdout=theirs,
        env=environment,
        check=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert b"\x1b[32mdone\x1b[0m" in shown


def test_it_starts_fast():
    code = "import sys, cbtm_pipeline.__main__, cbtm_pipeline.status; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {
        "torch",
        "transformers",
        "scipy",
        "sklearn",
        "pyarrow",
        "rich",
        "submitit",
        "snakemake",
    } & set(loaded)


def test_cbtm_is_a_command_with_two_subcommands(tmp_path):
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "cbtm"
    ].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for arguments in (["--help"], ["status", "--help"], ["doctor", "--help"]):
        assert run(*arguments, cwd=tmp_path).startswith("usage: cbtm " + " ".join(arguments[:-1]))


@pytest.mark.slow
def test_a_finished_run_is_done(finished):
    found = status.gather(finished / "results", None, (finished / "results/report.html").stat().st_mtime)
    assert [row.name for row in found.rows if row.kind == "stage"] == [
        name for name in status.OUTPUTS if name != "demo_corpus"
    ]
    assert [row.name for row in found.rows if row.kind == "expert"] == [
        "seed",
        "0",
        "1",
        "dense",
        "dense-steps",
        "random-0",
        "random-1",
    ]
    assert {row.state for row in found.rows} == {"done"}
    assert all(row.step == row.n_steps for row in found.rows)
    assert (found.active, found.notes) == (None, [])
