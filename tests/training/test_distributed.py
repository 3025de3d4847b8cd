"""Trainings on several processes.

They equal a training on one process but for rounding, equal themselves in every bit, and never hang.
"""

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import made_training as made
from cbtm_pipeline import config, train_expert
from cbtm_pipeline.base import cli
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.training import checkpoint, model, training_log
from made_driver import Ranks, output
from made_training import NEVER, NOW, place

N_STEPS = 40


@pytest.fixture(scope="module")
def driver() -> Iterator[Ranks]:
    found = Ranks("ranks_driver.py")
    yield found
    found.end()


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model, and a config of 40 steps of 4 sequences.

    A forward pass has one sequence; each step is saved.
    """
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


def losses(where: train_expert.Files) -> list[float]:
    """The losses of all steps, then of all validations."""
    rows = training_log.read(where.out.with_name("metrics.jsonl"))
    validations = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert len(validations) == 4
    return [*(row["loss"] for row in rows), *validations]


def test_three_processes_train_as_one_does(outdir, together):
    made.check_published(together, N_STEPS)
    alone = place(outdir, "alone")
    made.train(made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NEVER), alone, "0")
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(alone)[N_STEPS - 1] < losses(alone)[0] - 0.1
    cards = [expert_files.read_card(where.out) for where in (together, alone)]
    assert cards[0]["weights"] != cards[1]["weights"]  # summed in another order
    changes = ("weights", "identity", "seal", "final_loss", "validation_loss")
    assert [{**card, **dict.fromkeys(changes)} for card in cards] == [
        {**cards[0], **dict.fromkeys(changes)}
    ] * 2


def test_only_process_0_writes_and_logs(outdir, together):
    lines = (together.work / "log").read_text().splitlines()
    assert sum("published" in line for line in lines) == 1
    assert output(outdir / "together.log", 0).splitlines() == lines
    assert [output(outdir / "together.log", rank) for rank in (1, 2)] == ["", ""]


@pytest.fixture(scope="module")
def stopped(outdir, driver) -> train_expert.Files:
    """Expert 0, trained by three processes, of which the last gets a SIGTERM in its fifth step."""
    where = place(outdir, "stopped")
    args, signals = command_line(outdir, where), {2: [5, "SIGTERM"]}
    assert driver.run("train", outdir / "stopped.log", args, signals=signals) == [cli.EXIT_SAVED] * 3
    assert 5 <= saved_step(where) <= 7
    return where


def test_going_on_ends_in_the_same_bits(outdir, driver, together, stopped):
    where = place(outdir, "resumed")
    shutil.copytree(stopped.work / "state", where.work / "state")
    step = saved_step(where)
    assert driver.run("train", outdir / "resumed.log", command_line(outdir, where)) == [0, 0, 0]
    assert f"going on after step {step}\n" in output(outdir / "resumed.log", 0)
    assert where.out.read_bytes() == together.out.read_bytes()
    assert losses(where) == losses(together)
    made.check_published(where, N_STEPS)


def test_another_number_of_processes_can_go_on(outdir, driver, together, stopped):
    where = place(outdir, "fewer")
    shutil.copytree(stopped.work / "state", where.work / "state")
    assert driver.run("train", outdir / "fewer.log", command_line(outdir, where), world_size=2) == [0, 0]
    assert "going on after step" in output(outdir / "fewer.log", 0)
    assert losses(where) == pytest.approx(losses(together), abs=1e-5)
    made.check_published(where, N_STEPS)


def test_a_sharded_model_trains_as_a_whole_one_does(outdir, driver, together, sharded):
    where = place(outdir, "sharded")
    assert driver.run(
        "train", outdir / "sharded.log", command_line(outdir, where, config=sharded), world_size=2
    ) == [0, 0]
    assert "2 processes, 1 sequences at once, sharded" in output(outdir / "sharded.log", 0)
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
    log, signals = outdir / "sharded-stopped.log", {1: [5, "SIGTERM"]}
    assert driver.run("train", log, arguments, 2, signals) == [cli.EXIT_SAVED] * 2
    alone = place(outdir, "sharded-then-alone")
    shutil.copytree(where.work / "state", alone.work / "state")
    assert driver.run("train", outdir / "sharded-stopped.log", arguments, world_size=2) == [0, 0]
    assert "going on after step" in output(outdir / "sharded-stopped.log", 0)
    assert where.out.read_bytes() == place(outdir, "sharded").out.read_bytes()
    assert losses(where) == losses(place(outdir, "sharded"))
    made.train(made.make_config(steps=N_STEPS, micro_batch_size=1, validations=4, run=NEVER), alone, "0")
    assert losses(alone) == pytest.approx(losses(together), abs=1e-5)


def test_a_sharded_model_needs_equal_parts(outdir, driver, sharded):
    where = place(outdir, "sharded-three")
    assert driver.run("train", outdir / "sharded-three.log", command_line(outdir, where, config=sharded)) == [
        1,
        1,
        1,
    ]
    assert "train.batch_size: 4 sequences on 3 processes. Expected a multiple" in output(
        outdir / "sharded-three.log", 0
    )


# --- mistakes and accidents -----------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_if_one_fails_all_end(outdir, driver, which):
    where, log = place(outdir, f"failed-{which}"), outdir / f"failed-{which}.log"
    good, bad = (
        command_line(outdir, where),
        command_line(outdir, where, data=outdir / "nowhere/manifest.json"),
    )
    assert driver.run("train", log, [bad if rank == which else good for rank in range(3)]) == [1, 1, 1]
    assert "nowhere/manifest.json" in output(log, which)
    for rank in {0, 1, 2} - {which}:
        assert f"ended, as another one has failed (process {which}: " in output(log, rank)
        assert "nowhere/manifest.json" in output(log, rank)
        assert "Traceback" not in output(log, rank)
    assert not where.out.exists()


def test_if_one_is_killed_all_end(outdir, driver):
    where, log = place(outdir, "killed"), outdir / "killed.log"
    statuses = driver.run("train", log, command_line(outdir, where), signals={1: [2, "SIGKILL"]})
    assert statuses == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "ended, as another one has failed" in output(log, rank)
        assert "Traceback" not in output(log, rank)


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
