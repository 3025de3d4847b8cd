"""Trainings that are stopped, killed, damaged or forgotten, and go on to the same weights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import made_training as made
from cbtm_pipeline import config, train_expert
from cbtm_pipeline.base import lock
from cbtm_pipeline.training import checkpoint, expert_folder, training_log
from made_driver import Driver
from made_training import NEVER, NOW, check_published, place, stop_after

Change = tuple[str, str]


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model, and configs of 3, 20 and 100 steps that save after each."""
    out = tmp_path_factory.mktemp("interrupted")
    made.write_seed(out)
    for n_steps in (3, 20, 100):
        config.write(made.make_config(steps=n_steps, run=NOW), out / f"{n_steps}.json")
    return out


def reference(outdir: Path, n_steps: int) -> bytes:
    """Weights of expert 0 after an undisturbed training in this process, which saves nothing."""
    where = made.files(outdir, "0", to=f"undisturbed-{n_steps}")
    if not where.out.exists():
        made.train(made.make_config(steps=n_steps, run=NEVER), where, "0")
    return where.out.read_bytes()


class Crashes(Driver):
    """See crash_driver.py."""

    def __init__(self, outdir: Path):
        super().__init__("crash_driver.py")
        self.outdir = outdir

    def run(
        self,
        n_steps: int,
        where: train_expert.Files,
        at: int = 0,
        signal: str = "SIGKILL",
        after: float | None = None,
    ) -> tuple[int, list[Change]]:
        """Train expert 0 in a child that gets the signal before its `at`-th change to files, or is killed `after` so many seconds; return
        exit status and changes."""
        root = where.work.parents[1]
        args = command_line(self.outdir, n_steps, where)
        answer = self.tell(
            {
                "args": args,
                "root": f"{root}/",
                "at": at,
                "signal": signal,
                "after": after,
                "log": f"{root}.log",
            }
        )
        return answer["status"], [(event, path.removeprefix(f"{root}/")) for event, path in answer["events"]]


def command_line(outdir: Path, n_steps: int, where: train_expert.Files) -> list[str]:
    paths = [
        ("--data", where.data),
        ("--tokenizer", where.tokenizer),
        ("--seed-model", where.seed_model),
        ("--out", where.out),
    ]
    options = [
        ("--config", outdir / f"{n_steps}.json"),
        ("--expert", "0"),
        *paths,
        ("--work", where.work),
        ("--threads", 1),
    ]
    return [str(part) for option in options for part in option]


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


def test_killed_anywhere(outdir, driver):
    """Kill at every change from nothing to the tidied-up expert; start again, every other time without the output, as Snakemake does."""
    status, events = driver.run(3, place(outdir, "short"))
    assert status == 0
    moves = {"os.rename", "os.remove", "os.rmdir"}
    # what is done to temporary files is seen by nobody; renaming them counts
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
            assert expert_folder.read_card(where.out)["expert"] == "0"
        if n % 2:
            where.out.unlink(missing_ok=True)
        status, _ = driver.run(3, where)
        assert (i, events[i - 1], status) == (i, events[i - 1], 0)
        assert where.out.read_bytes() == reference(outdir, 3)
        check_published(where, 3)


def test_killed_at_any_moment(outdir, driver, life):
    """Thirty trainings, each killed at a moment drawn at random, computing or saving, and started again."""
    where = place(outdir, "timed")
    times = []
    for _ in range(3):
        began = time.monotonic()
        assert driver.run(20, where)[0] == 0
        times.append(time.monotonic() - began)
        where.out.unlink()
    rng = np.random.default_rng(0)
    n_killed = n_resumed = 0
    for i, after in enumerate(rng.uniform(0, min(times), 30)):
        where = place(outdir, f"moment-{i}")
        status, _ = driver.run(20, where, after=float(after))
        n_killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        before = checkpoint.candidates(where.work / "state")
        assert driver.run(20, where)[0] == 0
        n_resumed += (
            bool(before) and "going on after step" in Path(f"{where.work.parents[1]}.log").read_text()
        )
        assert where.out.read_bytes() == reference(outdir, 20)
        check_published(where, 20)
    print(f"{n_killed} killed, {n_resumed} of them went on from a state")
    assert n_killed > 15  # on a busy machine some are over before their moment comes
    assert n_resumed > 3


def test_command_line_is_told_to_stop(outdir):
    where = place(outdir, "cli")
    command = [
        sys.executable,
        "-m",
        "cbtm_pipeline.train_expert",
        *command_line(outdir, 100, where),
        "--log",
        str(outdir / "cli.log"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (saved := checkpoint.candidates(where.work / "state")) and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf'another run is writing here .*"pid": {process.pid}'):
        lock.hold(where.work)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == cli.EXIT_SAVED
    assert saved
    assert "told to stop: state saved after step" in (outdir / "cli.log").read_text()
    assert not where.out.exists()
    made.train(made.make_config(steps=100, run=NEVER), where, "0")
    assert where.out.read_bytes() == reference(outdir, 100)
    check_published(where, 100)


def test_stopped_at_the_last_step_is_finished(outdir):
    where = made.files(outdir, "0", to="last")
    assert made.train(made.make_config(steps=3), where, "0", stop_after(3)) == reference(outdir, 3)


def test_trains_again_when_the_output_is_deleted(outdir):
    where = made.files(outdir, "0", to="force")
    for _ in range(2):
        with made.log_lines() as lines:
            made.train(made.make_config(steps=3, run=NOW), where, "0")
        assert not any("going on" in line for line in lines)
        check_published(where, 3)
        where.out.unlink()


def test_damaged_state_costs_steps_but_not_the_result(outdir):
    cfg = made.make_config(steps=20, run=NOW)
    where = made.files(outdir, "0", to="damaged")
    made.train(cfg, where, "0", stop_after(9))
    newest, before = checkpoint.candidates(where.work / "state")
    newest.write_bytes(newest.read_bytes()[:1000])
    with made.log_lines() as lines:
        assert made.train(cfg, where, "0") == reference(outdir, 20)
    assert any("going on after step 8" in line for line in lines)
    check_published(where, 20)

    made.train(cfg, where, "0", stop_after(9))
    for path in (newest, before):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged .*delete .*state to train this expert from the start"):
        made.train(cfg, where, "0")


@pytest.mark.parametrize(
    "text", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 3}\n{"step": 4}\n', '{"step": 1}\n{"st']
)
def test_a_state_without_its_log_is_an_error(outdir, text):
    where = made.files(outdir, "0", to=f"log-{len(text)}")
    made.train(made.make_config(), where, "0", stop_after(3))
    (where.work / "state/metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not the log of 3 steps"):
        made.train(made.make_config(), where, "0")


def test_another_plan_starts_anew(outdir):
    where = made.files(outdir, "0", to="replanned")
    made.train(made.make_config(steps=20, lr=0.1), where, "0", stop_after(9))
    with made.log_lines() as lines:
        assert made.train(made.make_config(steps=20), where, "0") == reference(outdir, 20)
    assert any("training starts anew" in line for line in lines)


def test_whoever_waited_does_not_train_the_same_again(outdir):
    where = made.files(outdir, "0", to="waited")
    cfg = made.make_config(steps=3)
    weights = made.train(cfg, where, "0")
    for steps, expected in ((3, True), (4, False)):
        how = plan.train_expert(made.make_config(steps=steps), "0")
        with made.log_lines() as lines:
            assert train_expert.train_and_publish(how, cfg.run, where, lambda: False, waited=True)
        assert ("published meanwhile" in lines[-1]) == expected
        assert (where.out.read_bytes() == weights) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--expert": "5"}, "Expected one of seed, 0, 1, dense"),
        ({"--expert": "seed"}, "expected for every expert but the seed"),
        ({"--out": "weights.bin"}, "Expected model.safetensors"),
    ],
)
def test_command_line_mistakes(outdir, monkeypatch, capsys, change, message):
    args = command_line(outdir, 3, place(outdir, "mistake"))
    for option, value in change.items():
        args[args.index(option) + 1] = value
    monkeypatch.setattr(sys, "argv", ["train_expert", *args])
    with pytest.raises(SystemExit) as end:
        train_expert.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (outdir / "mistake").exists()
