"""Trainings on several processes: equal to one process but for rounding, equal to themselves in every bit, and never left hanging."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import made_training as made
from cbtm_pipeline import config, train_expert
from cbtm_pipeline.training import checkpoint, distributed, expert_folder, model, training_log
from made_driver import Driver
from made_training import NEVER, NOW, place

N_STEPS = 40


class Ranks(Driver):
    """See ranks_driver.py."""

    def start(self, what: str, log: Path, args: Any = (), world_size: int = 3) -> list[int]:
        """Start the processes; return their ids."""
        return self.tell({"what": what, "args": args, "log": str(log), "world_size": world_size})["pids"]

    def run(self, what: str, log: Path, args: Any = (), world_size: int = 3) -> list[int]:
        """Run the processes to their end; return their exit statuses."""
        self.start(what, log, args, world_size)
        return self.answer()["status"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Ranks]:
    found = Ranks("ranks_driver.py")
    yield found
    found.end()


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model, and a config of 40 steps of 4 sequences, one at a time, all of them saved."""
    out = tmp_path_factory.mktemp("distributed")
    made.write_seed(out)
    made.write_validation(out)
    config.write(
        made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NOW), out / "config.json"
    )
    return out


@pytest.fixture(scope="module")
def sharded(outdir) -> Path:
    """The config of a training whose model is spread over its processes."""
    config.write(
        made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NOW | {"sharded": True}),
        outdir / "sharded.json",
    )
    return outdir / "sharded.json"


def command_line(outdir: Path, where: train_expert.Files, **change: Path) -> list[str]:
    paths: dict[str, Any] = {
        "data": where.data,
        "tokenizer": where.tokenizer,
        "seed-model": where.seed_model,
        "out": where.out,
    }
    options = {
        "config": outdir / "config.json",
        "expert": 0,
        **paths,
        "work": where.work,
        "log": where.work / "log",
        **change,
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def said(log: Path, rank: int) -> str:
    return log.with_name(f"{log.name}.{rank}").read_text()


@pytest.fixture(scope="module")
def together(outdir, driver) -> train_expert.Files:
    """Expert 0, trained by three processes without any disturbance."""
    where = place(outdir, "together")
    assert driver.run("train", outdir / "together.log", command_line(outdir, where)) == [0, 0, 0]
    return where


def saved_step(where: train_expert.Files) -> int:
    return max(
        (int(path.stem.removeprefix("step-")) for path in checkpoint.candidates(where.work / "state")),
        default=0,
    )


def await_state(where: train_expert.Files, step: int) -> None:
    """Until the state of this step or a later one is saved."""
    deadline = time.monotonic() + 60
    while saved_step(where) < step:
        assert time.monotonic() < deadline and not where.out.exists()
        time.sleep(0.001)


def losses(where: train_expert.Files) -> list[float]:
    """Of all steps, then of all looks at validation."""
    rows = training_log.read(where.out.with_name("metrics.jsonl"))
    looks = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert len(looks) == 4
    return [*(row["loss"] for row in rows), *looks]


def test_three_processes_train_as_one_does(outdir, together):
    made.check_published(together, N_STEPS)
    alone = place(outdir, "alone")
    made.train(made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NEVER), alone, "0")
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(alone)[N_STEPS - 1] < losses(alone)[0] - 0.1
    cards = [expert_folder.read_card(where.out) for where in (together, alone)]
    assert cards[0]["weights"] != cards[1]["weights"]  # summed in another order
    changes = ("weights", "final_loss", "validation_loss")
    assert [{**card, **dict.fromkeys(changes)} for card in cards] == [
        {**cards[0], **dict.fromkeys(changes)}
    ] * 2


def test_only_process_0_writes_and_speaks(outdir, together):
    lines = (together.work / "log").read_text().splitlines()
    assert sum("published" in line for line in lines) == 1
    assert said(outdir / "together.log", 0).splitlines() == lines
    assert [said(outdir / "together.log", rank) for rank in (1, 2)] == ["", ""]


@pytest.fixture(scope="module")
def stopped(outdir, driver) -> train_expert.Files:
    """The same, with a SIGTERM to one process, not the first, in the middle."""
    where = place(outdir, "stopped")
    pids = driver.start("train", outdir / "stopped.log", command_line(outdir, where))
    await_state(where, 5)
    os.kill(pids[2], signal.SIGTERM)
    assert driver.answer()["status"] == [cli.EXIT_SAVED] * 3
    assert 5 <= saved_step(where) < N_STEPS
    return where


def test_going_on_ends_in_the_same_bits(outdir, driver, together, stopped):
    where = place(outdir, "resumed")
    shutil.copytree(stopped.work / "state", where.work / "state")
    step = saved_step(where)
    assert driver.run("train", outdir / "resumed.log", command_line(outdir, where)) == [0, 0, 0]
    assert f"going on after step {step}\n" in said(outdir / "resumed.log", 0)
    assert where.out.read_bytes() == together.out.read_bytes()
    assert losses(where) == losses(together)
    made.check_published(where, N_STEPS)


def test_another_number_of_processes_can_go_on(outdir, driver, together, stopped):
    where = place(outdir, "fewer")
    shutil.copytree(stopped.work / "state", where.work / "state")
    assert driver.run("train", outdir / "fewer.log", command_line(outdir, where), world_size=2) == [0, 0]
    assert "going on after step" in said(outdir / "fewer.log", 0)
    assert losses(where) == pytest.approx(losses(together), abs=1e-5)
    made.check_published(where, N_STEPS)


def test_a_sharded_model_trains_as_a_whole_one_does(outdir, driver, together, sharded):
    where = place(outdir, "sharded")
    assert driver.run(
        "train", outdir / "sharded.log", command_line(outdir, where, config=sharded), world_size=2
    ) == [0, 0]
    assert "2 processes, 1 sequences at once, sharded" in said(outdir / "sharded.log", 0)
    made.check_published(where, N_STEPS)
    assert losses(where) == pytest.approx(losses(together), abs=1e-5)
    a, b = (load_file(found.out) for found in (where, together))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-3), name
    model.load(where.out.parent)


def test_a_sharded_training_goes_on_in_the_same_bits_and_on_one_process(outdir, driver, together, sharded):
    where = place(outdir, "sharded-stopped")
    arguments = command_line(outdir, where, config=sharded)
    pids = driver.start("train", outdir / "sharded-stopped.log", arguments, world_size=2)
    await_state(where, 5)
    os.kill(pids[1], signal.SIGTERM)
    assert driver.answer()["status"] == [cli.EXIT_SAVED] * 2
    alone = place(outdir, "sharded-then-alone")
    shutil.copytree(where.work / "state", alone.work / "state")
    assert driver.run("train", outdir / "sharded-stopped.log", arguments, world_size=2) == [0, 0]
    assert "going on after step" in said(outdir / "sharded-stopped.log", 0)
    assert where.out.read_bytes() == place(outdir, "sharded").out.read_bytes()
    assert losses(where) == losses(place(outdir, "sharded"))
    made.train(made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NEVER), alone, "0")
    assert losses(alone) == pytest.approx(losses(together), abs=1e-5)


def test_micro_batches_are_chosen_for_each_process(tmp_path, driver):
    """On devices with little memory: all three sequences of a process at once, or one that is computed anew; the losses are the same."""
    assert driver.run("small_devices", tmp_path / "log", world_size=2) == [0, 0]
    answers = [json.loads(said(tmp_path / "log", rank)) for rank in range(2)]
    assert answers[0] == answers[1]
    (kept, whole), (recomputed, sharded) = answers[0]
    assert kept == [3, False]
    assert recomputed == [1, True]
    assert whole == pytest.approx(sharded, abs=1e-5)


def test_a_sharded_model_wants_equal_parts(outdir, driver, sharded):
    where = place(outdir, "sharded-three")
    assert driver.run("train", outdir / "sharded-three.log", command_line(outdir, where, config=sharded)) == [
        1,
        1,
        1,
    ]
    assert "train.batch_size: 4 sequences on 3 processes. Expected a multiple" in said(
        outdir / "sharded-three.log", 0
    )


# --- what the processes exchange --------------------------------------------------------------------------------------


def test_sums(tmp_path, driver):
    assert driver.run("gradients", tmp_path / "log") == [0, 0, 0]
    for rank in range(3):
        gradients, sums = json.loads(said(tmp_path / "log", rank))
        assert gradients == [[6, 6], [1], None, [30, 30], None]  # all, one, none, all of them; not trained
        assert sums == [3, 1, 1.5]


def test_what_process_0_has_and_does(tmp_path, driver):
    assert driver.run("share", tmp_path / "log") == [0, 0, 0]
    tensors = {
        "a": ["torch.int64", [[0, 1, 2], [3, 4, 5]]],
        "b": ["torch.float32", 0.5],
        "c": ["torch.bool", [True, False]],
        "d": ["torch.float32", []],
    }
    for rank in range(3):
        assert json.loads(said(tmp_path / "log", rank)) == [7, 0, tensors, True, rank == 0]


# --- mistakes and accidents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_if_one_fails_all_end(outdir, driver, which):
    where, log = place(outdir, f"failed-{which}"), outdir / f"failed-{which}.log"
    good, bad = (
        command_line(outdir, where),
        command_line(outdir, where, data=outdir / "nowhere/manifest.json"),
    )
    began = time.monotonic()
    assert driver.run("train", log, [bad if rank == which else good for rank in range(3)]) == [1, 1, 1]
    assert time.monotonic() - began < 20
    assert "nowhere/manifest.json" in said(log, which)
    for rank in {0, 1, 2} - {which}:
        assert f"ended, as another one has failed (process {which}: " in said(log, rank)
        assert "nowhere/manifest.json" in said(log, rank)
        assert "Traceback" not in said(log, rank)
    assert not where.out.exists()


def test_if_one_is_killed_all_end(outdir, driver):
    where, log = place(outdir, "killed"), outdir / "killed.log"
    pids = driver.start("train", log, command_line(outdir, where))
    await_state(where, 1)
    os.kill(pids[1], signal.SIGKILL)
    assert driver.answer()["status"] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "ended, as another one has failed" in said(log, rank)
        assert "Traceback" not in said(log, rank)


@pytest.mark.parametrize(("which", "how"), [(0, "error"), (1, "error"), (1, "asked"), (0, "killed")])
def test_nobody_waits_for_who_will_not_come(tmp_path, driver, which, how):
    statuses = driver.run("one_fails", tmp_path / "log", [str(which), how], world_size=2)
    assert statuses[1 - which] == 1
    assert statuses[which] == (-signal.SIGKILL if how == "killed" else 1)
    why = "process 0 is gone" if how == "killed" else f"process {which}: the disk is full"
    assert f"ended, as another one has failed ({why})" in said(tmp_path / "log", 1 - which)


def test_a_batch_is_too_small_for_so_many(outdir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_expert", *command_line(outdir, place(outdir, "small"))])
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE: 5 processes for expert 0\. Expected at most 4, .*train\.batch_size"
    ):
        train_expert.main()
    assert not (outdir / "small").exists()


def test_environment():
    full = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    group = distributed.from_environment(full)
    assert (group.rank, group.world_size, group.local_rank) == (3, 4, 1)
    for alone in ({}, {"RANK": "0"}, full | {"WORLD_SIZE": "1", "RANK": "0"}):
        assert distributed.from_environment(alone).world_size == 1
    wrong = [
        full | {"RANK": "4"},
        full | {"RANK": "x"},
        full | {"WORLD_SIZE": ""},
        full | {"MASTER_PORT": ""},
    ]
    for environ in [
        *wrong,
        *({k: v for k, v in full.items() if k != name} for name in full if name != "WORLD_SIZE"),
    ]:
        with pytest.raises(
            ValueError, match=r"RANK=.*MASTER_PORT=.*Expected all of them as torchrun sets them"
        ):
            distributed.from_environment(environ)
