"""Trainings that signals stop or kill, at counted events: each goes on to the same weights."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import made_training as made
from cbtm_pipeline import config
from cbtm_pipeline.base import cli, lock
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.training import checkpoint, training_log
from interrupted import Change, Crashes, command_line, reference
from made_training import NEVER, NOW, check_published, place


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model, and configs of 3 and 20 steps that save after each."""
    out = tmp_path_factory.mktemp("interrupted")
    made.write_seed(out)
    for n_steps in (3, 20):
        config.write(made.make_config(steps=n_steps, run=NOW), out / f"{n_steps}.json")
    return out


@pytest.fixture(scope="module")
def driver(outdir) -> Iterator[Crashes]:
    found = Crashes(outdir)
    yield found
    found.end()


@pytest.fixture(scope="module")
def life(outdir, driver) -> list[Change]:
    """The changes to files in an undisturbed training of 20 steps."""
    where = place(outdir, "life")
    status, events = driver.run(20, where)
    assert status == 0
    assert where.out.read_bytes() == reference(outdir, 20)
    check_published(where, 20)
    return events


def after_state(events: list[Change], step: int) -> int:
    """The number of the first change after the state of this step is in place."""
    return (
        next(
            i for i, (event, path) in enumerate(events) if event == "os.rename" and f"step-{step:08d}" in path
        )
        + 2
    )


def test_twenty_steps_are_ten_and_a_kill_and_ten(outdir, driver, life):
    where = place(outdir, "ten")
    status, _ = driver.run(20, where, at=after_state(life, 10))
    assert status == -signal.SIGKILL
    assert checkpoint.candidates(where.work / "state")[0].name == "step-00000010.safetensors"
    status, events = driver.run(20, where)
    assert status == 0
    assert not any(
        "step-00000010" in path for event, path in events if event == "os.rename"
    )  # it did not start at 0 again
    assert where.out.read_bytes() == reference(outdir, 20)
    check_published(where, 20)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signals_save_and_exit(outdir, driver, life, name):
    where = place(outdir, name)
    status, _ = driver.run(20, where, at=after_state(life, 7), signal=name)
    assert status == cli.EXIT_SAVED
    assert checkpoint.candidates(where.work / "state")[0].name in [
        f"step-{step:08d}.safetensors" for step in (7, 8, 9)
    ]
    assert driver.run(20, where)[0] == 0
    assert where.out.read_bytes() == reference(outdir, 20)
    check_published(where, 20)


@pytest.mark.slow
def test_killed_anywhere(outdir, driver):
    """Kill at each change that others can see, and start again.

    Every other time the output is deleted before, as Snakemake does.
    """
    status, events = driver.run(3, place(outdir, "short"))
    assert status == 0
    moves = {"os.rename", "os.remove", "os.rmdir"}
    # nobody sees what happens to temporary files, until they are renamed
    seen = [
        i
        for i, (event, path) in enumerate(events, 1)
        if event in moves and (event == "os.rename" or not path.endswith(".tmp"))
    ]
    alike = (
        "/.staging/",
        "config.json",
        "tokenizer",
    )  # further files of the folder, published one after the other
    points = [i for i in seen if not any(part in events[i - 1][1] for part in alike)]
    names = [path for _, path in (events[i - 1] for i in points)]
    assert sum("model.safetensors" in name for name in names) == 1
    assert sum("step-0000000" in name for name in names) >= 4  # three states come, one and then two go
    assert len(points) > 12
    for n, i in enumerate(points):
        where = place(outdir, f"killed-{i}")
        assert driver.run(3, where, at=i)[0] == -signal.SIGKILL
        if where.out.exists():  # then all the rest is there, too
            assert [row["step"] for row in training_log.read(where.out.with_name("metrics.jsonl"))] == [
                1,
                2,
                3,
            ]
            assert expert_files.read_card(where.out)["expert"] == "0"
        if n % 2:
            where.out.unlink(missing_ok=True)
        status, _ = driver.run(3, where)
        assert (i, events[i - 1], status) == (i, events[i - 1], 0)
        assert where.out.read_bytes() == reference(outdir, 3)
        check_published(where, 3)


@pytest.mark.slow
def test_killed_while_it_computes_and_saves(outdir, driver):
    """Thirty trainings, each killed before one of its function calls, in any thread, and started again."""
    answer = driver.command(20, place(outdir, "calls"), "calls", 0)
    assert answer["status"] == 0
    n_calls = answer["n_calls"]
    edges = np.linspace(1, n_calls, 31).astype(int)
    n_resumed = 0
    for i, at in enumerate(np.random.default_rng(0).integers(edges[:-1], edges[1:])):
        where = place(outdir, f"call-{i}")
        assert driver.command(20, where, "calls", int(at))["status"] == -signal.SIGKILL
        has_state = bool(checkpoint.candidates(where.work / "state"))
        assert driver.run(20, where)[0] == 0
        resumed = "going on after step" in Path(f"{where.work.parents[1]}.log").read_text()
        assert resumed == has_state
        n_resumed += resumed
        assert where.out.read_bytes() == reference(outdir, 20)
        check_published(where, 20)
    assert 15 <= n_resumed < 30  # the first one is killed before anything is saved


# Runs the command line. Before the state of step 2 gets its name, says so and waits for the end of the pipe.
PAUSED = """
import os, runpy, sys

def watch(event, args):
    if event == "os.rename" and "step-00000002" in str(args[1]):
        os.write(1, b"saving\\n")
        os.read(0, 1)

sys.addaudithook(watch)
runpy.run_module("cbtm_pipeline.train_expert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_command_line_is_stopped_by_a_signal(outdir):
    where = place(outdir, "cli")
    log = outdir / "cli.log"
    command = [sys.executable, "-c", PAUSED, *command_line(outdir, 20, where), "--log", str(log)]
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"saving\n"
        with pytest.raises(ValueError, match=rf"another run is writing here \(process {process.pid} on"):
            lock.hold(where.work)
        process.send_signal(signal.SIGTERM)
        process.stdin.close()
        assert process.wait() == cli.EXIT_SAVED
    assert checkpoint.candidates(where.work / "state")[0].name in [
        f"step-{step:08d}.safetensors" for step in (2, 3, 4)
    ]
    assert "state saved after step" in log.read_text()
    assert not where.out.exists()
    made.train(made.make_config(steps=20, run=NEVER), where, "0")
    assert where.out.read_bytes() == reference(outdir, 20)
    check_published(where, 20)
