"""What a training does beside its steps: it validates, stops at a loss that explodes, and saves."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import made_training as made
from cbtm_pipeline import config, plan, train_expert
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.training import (
    batches,
    checkpoint,
    data,
    distributed,
    loop,
    loss,
    model,
    placement,
    training_log,
    validation,
)
from cbtm_pipeline.training import step as train_step
from changed_config import changed


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with validation documents for both clusters, and a trained seed model."""
    out = tmp_path_factory.mktemp("loop")
    made.write_seed(out)
    made.write_validation(out)
    return out


def rows_of(where: train_expert.Files) -> list[training_log.Row]:
    return training_log.read(where.out.with_name("metrics.jsonl"))


# --- validation -----------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 20))
def test_validations_are_evenly_spread_and_the_last_is_at_the_end(n_steps, n):
    steps = sorted(validation.validation_steps(n_steps, n))
    assert steps[-1] == n_steps
    assert len(steps) == min(n, n_steps) or len(steps) == n
    assert np.ptp(np.diff([0, *steps])) <= 1
    assert validation.validation_steps(n_steps, 0) == set()


@pytest.mark.parametrize("rng_seed", [0, 1, 2**62, 2**63 - 1])
def test_no_model_reads_in_the_order_of_the_one_that_it_began_as(rng_seed):
    cfg = config.validate(changed(cluster__parents=2, seed=rng_seed))
    orders = {loop.order(plan.train_expert(cfg, name)) for name in ("seed", "parent-1", "3")}
    assert len(orders) == 3


def test_validation_loss_is_the_mean_over_the_text(outdir):
    how = plan.train_expert(made.make_config(validations=5), "0")
    net = model.load(outdir / "experts/seed")
    stream = batches.Stream([made.documents(3, np.random.default_rng(1)).values])
    n = max(1, min(stream.n_blocks(made.SEQ_LEN), int(validation.MAX_SHARE * 10 * 4 / 5)))
    found = validation.validate(
        placement.Placed(loss.NextToken(net), 2, False, torch.device("cpu")), stream, how, distributed.ALONE
    )
    blocks = torch.from_numpy(np.stack([stream.read(i * made.SEQ_LEN, made.SEQ_LEN + 1) for i in range(n)]))
    assert found.item() == pytest.approx(net(input_ids=blocks, labels=blocks).loss.item(), abs=1e-5)
    assert net.training


def test_validation_changes_no_weight_and_is_logged(outdir):
    plain, validated = (made.files(outdir, "0", to=name) for name in ("unvalidated", "validated"))
    weights = made.train(made.make_config(), plain, "0")
    with made.log_lines() as lines:
        assert made.train(made.make_config(validations=5), validated, "0") == weights
    assert [row["step"] for row in rows_of(validated) if "valid_loss" in row] == [2, 4, 6, 8, 10]
    assert sum(line.startswith("step ") and "validation " in line for line in lines) == 5
    card = expert_files.read_card(validated.out)
    assert card["validation_loss"] == rows_of(validated)[-1]["valid_loss"]
    assert expert_files.read_card(plain.out)["validation_loss"] is None


def test_seed_and_dense_models_are_validated_on_all_clusters(outdir):
    where = made.files(outdir, "dense", to="all-clusters")
    cfg = made.make_config(validations=2, validation_share=0.25, steps=4)
    made.train(cfg, where, "dense")
    assert all(math.isfinite(row["valid_loss"]) for row in rows_of(where) if row["step"] in (2, 4))
    manifest = artifact.read_sealed(where.data, "shards")
    stream = data.read_validation(where.data, manifest, plan.train_expert(cfg, "dense"))
    assert stream is not None
    assert stream.n_tokens == sum(
        int(d.offsets[-1])
        for d in heldout.read_validation(where.data, heldout.select_validation(where.data, manifest, 0.25, 0))
    )


def test_a_training_that_gets_no_better_ends(outdir):
    """At a learning rate near zero, neither the weights nor the loss change."""
    cfg = made.make_config(validations=10, patience=2, lr=1e-30, steps=20)
    where = made.files(outdir, "0", to="patient")
    with made.log_lines() as lines:
        made.train(cfg, where, "0")
    assert len(rows_of(where)) == 6  # the first validation is the best, two more are no better
    assert any("ends after step 6 of 20" in line for line in lines)
    card = expert_files.read_card(where.out)
    assert (card["n_steps"], card["n_train_tokens"]) == (6, 6 * 4 * made.SEQ_LEN)
    assert "| steps | 6 with 4 sequences each |" in where.out.with_name("README.md").read_text()


def test_patience_survives_a_stop(outdir):
    cfg = made.make_config(validations=10, patience=2, lr=1e-30, steps=20)
    for n in (3, 4, 6):
        where = made.files(outdir, "0", to=f"patient-{n}")
        assert made.train(cfg, where, "0", made.stop_after(n)) == b""
        made.train(cfg, where, "0")
        assert len(rows_of(where)) == 6


def test_stalled():
    def stalled(losses: list[float], patience: int | None) -> bool:
        return validation.History(10, validation=losses).stalled(patience)

    assert not stalled([], 1)
    assert not stalled([1.0], 1)
    assert not stalled([3.0, 2.0], 1)
    assert stalled([2.0, 2.0], 1)
    assert stalled([2.0, 3.0], 1)
    assert not stalled([2.0, 3.0], 2)
    assert not stalled([2.0, 3.0, 1.9], 2)
    assert stalled([2.0, 3.0, 2.5], 2)
    assert not stalled([2.0, 3.0, 2.5], None)


# --- a loss that explodes -------------------------------------------------------------------------


def test_usual_loss():
    assert validation.History(10).usual_loss() == pytest.approx(math.log(10))
    assert validation.History(10, [5.0]).usual_loss() == 5.0
    assert validation.History(1000, [2.0] * 50 + [9.0] * 10).usual_loss() == 2.0
    assert validation.History(1000, [9.0] * 500 + [2.0] * 60).usual_loss() == 2.0  # old losses do not count


def test_a_loss_that_explodes_stops_before_the_step(outdir, monkeypatch):
    """One batch is nonsense, so its loss is far above the usual one. The state before it is saved."""
    how = plan.train_expert(made.make_config(steps=30, max_loss_jump=0.7), "0")
    stream = data.read(made.files(outdir, "0").data, how).stream
    original = batches.batch
    nonsense = np.random.default_rng(0).integers(1, made.VOCAB_SIZE, (4, made.SEQ_LEN + 1))

    def batch(stream, order, step, *rest):
        return nonsense if step == 26 else original(stream, order, step, *rest)

    def train(name: str, stop=lambda: False) -> None:
        net = model.load(outdir / "experts/seed")
        loop.train(net, loop.Task(how, made.make_config().run, stream, None, outdir / name, "f" * 32), stop)

    train("good", made.stop_after(26))
    monkeypatch.setattr(batches, "batch", batch)
    with pytest.raises(
        ValueError,
        match=r"expert 0, step 27: loss .* train\.max_loss_jump above the usual one\. Lower train\.lr",
    ):
        train("exploded")
    good, exploded = (checkpoint.load(outdir / name, "f" * 32) for name in ("good", "exploded"))
    assert good is not None
    assert exploded is not None
    assert exploded.step == good.step == 26
    assert all(torch.equal(tensor, exploded.tensors[name]) for name, tensor in good.tensors.items())
    assert len(training_log.read(outdir / "exploded/metrics.jsonl")) == 26


# --- saving beside the training -------------------------------------------------------------------


def test_a_state_has_the_weights_of_its_moment(tmp_path):
    """Weights that change while a state is written do not get into it. The next save waits for this one."""
    net = torch.nn.Linear(3, 3)
    optimizer = train_step.make_optimizer(net, plan.train_expert(made.make_config(), "0"))
    before = net.weight.detach().clone()
    with checkpoint.Saver() as saver:
        saver.save(tmp_path, 1, "f" * 32, checkpoint.capture(net, optimizer))
        with torch.no_grad():
            net.weight.add_(1)
        saver.save(tmp_path, 2, "f" * 32, checkpoint.capture(net, optimizer))
        assert checkpoint.candidates(tmp_path)[-1].name == "step-00000001.safetensors"
        saver.wait()
        state = checkpoint.load(tmp_path, "f" * 32)
        assert state is not None
        assert torch.equal(state.tensors["model.weight"], before + 1)
    checkpoint.candidates(tmp_path)[0].unlink()
    state = checkpoint.load(tmp_path, "f" * 32)
    assert state is not None
    assert torch.equal(state.tensors["model.weight"], before)


def test_an_error_of_saving_is_raised(tmp_path):
    (tmp_path / "state").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="state"), checkpoint.Saver() as saver:
        saver.save(tmp_path / "state", 1, "f" * 32, {})
    with pytest.raises(KeyError), checkpoint.Saver() as saver:  # of two errors, the training's
        saver.save(tmp_path / "state", 1, "f" * 32, {})
        raise KeyError


def test_a_state_that_is_damaged_when_read_back_removes_no_other(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, "f" * 32, {"model.a": torch.ones(3)})
    save_file = checkpoint.save_file

    def damaging(tensors, path, meta):
        save_file(tensors, path, meta)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(checkpoint, "save_file", damaging)
    with pytest.raises(OSError, match="damaged as soon as it was written"):
        checkpoint.save(tmp_path, 3, "f" * 32, {"model.a": torch.ones(3)})
    state = checkpoint.load(tmp_path, "f" * 32)
    assert state is not None
    assert state.step == 2


# --- Weights & Biases -----------------------------------------------------------------------------

HAS_WANDB = importlib.util.find_spec("wandb") is not None


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_a_training_that_needs_a_missing_package_does_not_begin(outdir):
    where = made.files(outdir, "0", to="untracked")
    with pytest.raises(
        ValueError,
        match=r"run\.wandb: mine, but the package wandb is missing\. Expected it\. Run pip install wandb\.",
    ):
        made.train(made.make_config(run={"wandb": "mine"}), where, "0")
    assert not where.out.exists()


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_rows_go_to_weights_and_biases(outdir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    where = made.files(outdir, "0", to="tracked")
    assert made.train(made.make_config(run={"wandb": "mine"}), where, "0") == made.train(
        made.make_config(), made.files(outdir, "0", to="not"), "0"
    )
    assert list((where.work / "wandb").glob("offline-run-*/*.wandb"))
