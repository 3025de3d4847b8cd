"""Trainings that are stopped, damaged or deleted: each goes on to the same weights."""

import sys
from pathlib import Path

import pytest

import made_training as made
from cbtm_pipeline import config, plan, train_expert
from cbtm_pipeline.training import checkpoint
from interrupted import command_line, reference
from made_training import NOW, check_published, place, stop_after


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model, and configs of 3 and 20 steps that save after each."""
    out = tmp_path_factory.mktemp("interrupted")
    made.write_seed(out)
    for n_steps in (3, 20):
        config.write(made.make_config(steps=n_steps, run=NOW), out / f"{n_steps}.json")
    return out


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


def test_a_process_that_waited_does_not_train_again_what_is_published(outdir):
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
