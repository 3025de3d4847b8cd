"""What `cbtm status` finds without Slurm, and the command."""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import made_status
import made_training as made
import pseudo_terminal
from cbtm_pipeline import config, status
from cbtm_pipeline.ops import run_state, status_table
from cbtm_pipeline.provenance import records, stale
from cbtm_pipeline.training import training_log
from made_status import HOUR, last_time, look, rows_of, say, submit

ROOT = Path(__file__).parents[1]


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
    files = (ROOT / "workflow/rules").glob("*.smk")
    text = "".join(path.read_text() for path in files)
    rules = dict(zip(*[iter(re.split(r"^rule (\w+):", text, flags=re.M)[1:])] * 2, strict=True))
    assert rules.keys() == {*status.OUTPUTS, "train_expert", "adopt"}
    assert rules.keys() - {"adopt"} == {*records.PLACES, "demo_corpus"}  # adopt makes what train_expert makes
    for rule in status.OUTPUTS:
        wildcard = "/{{kind}}" if rule == "choose" else "/{{expert}}" if rule in status.OF_MANY else ""
        assert f'f"{{OUT}}/logs/{rule}{wildcard}.log"' in rules[rule]
    assert 'f"{OUT}/logs/train_expert/{{expert}}.log"' in rules["train_expert"]
    assert status.OUTPUTS["demo_corpus"] == stale.DEMO
    for rule, place in records.PLACES.items():
        for output in place.outputs:
            wildcard = "{{kind}}" if rule == "choose" else "{{expert}}"
            assert f'f"{{OUT}}/{output.replace("{}", wildcard)}"' in rules[rule]
    for output in records.PLACES["train_expert"].outputs:
        assert f'f"{{OUT}}/{output.replace("{}", "{{expert}}")}"' in rules["adopt"]
        assert rule == "train_expert" or status.OUTPUTS[rule] == place.outputs[0]


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of `folder`."""
    code = """
import sys
from cbtm_pipeline.base import lock
lock.hold(sys.argv[1])
print("held", flush=True)
input()
"""
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
    command, pipe = [sys.executable, "-m", "cbtm_pipeline", "status"], subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
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
    shown = pseudo_terminal.shown("status", cwd=tmp_path, env=environment)
    assert "\x1b[32mdone\x1b[0m" in shown


# Rules that this run does not have.
OTHERS = {"demo_corpus", "eval_task", "tasks_table", "choose", "score_training", "second_round"}


@pytest.mark.slow
def test_a_finished_run_is_done(finished):
    found = status.gather(finished / "results", None, (finished / "results/report.html").stat().st_mtime)
    assert [row.name for row in found.rows if row.kind == "stage"] == [
        name for name in status.OUTPUTS if name not in OTHERS
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
