"""What went wrong in real use and said so badly. Each test is named after what the user did."""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from cbtm_pipeline import config, doctor
from cbtm_pipeline.base import artifact, errors, lock, read_yaml
from cbtm_pipeline.base.publish import publish
from cbtm_pipeline.ops import planned, run_state, which_run
from changed_config import changed
from made_project import ROOT, make_project, snakemake

# --- numbers and names in the config ------------------------------------------------------------------------


def float_keys() -> list[str]:
    """Every key of the default config that takes a fraction, lists included."""
    defaults = config.read(ROOT / "config.yaml").model_dump()
    return [
        f"{section}__{key}"
        for section, values in defaults.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance((value or [None])[0] if isinstance(value, list) else value, float)
    ]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), "1e999"])
def test_a_number_is_not_finite(value: Any) -> None:
    keys = float_keys()
    assert len(keys) >= 20
    for key in keys:
        is_list = isinstance(changed()[key.split("__")[0]][key.split("__")[1]], list)
        with pytest.raises(ValueError) as error:
            config.validate(changed(**{key: [value, value] if is_list else value}))
        assert key.replace("__", ".") in str(error.value) and "Expected" in str(error.value)
        assert all(line.endswith("Change it in your config.") for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**64}, "seed: 18446744073709551616. Expected less than or equal to"),
        ({"seed": 10**5000}, "seed: a int too large to show. Expected"),
        ({"embed__idf_power": 300}, "embed.idf_power: 300. Expected less than or equal to 10"),
        ({"eval__bootstrap": 1}, "eval.bootstrap: 1. Expected greater than or equal to 100"),
        ({"cluster__k": 10**9}, "cluster.k: 1000000000. Expected less than or equal to 10000"),
        ({"train__steps": 2**63}, "train.steps: "),
        (
            {"model__scratch": {"model_type": "llama", "rope_theta": float("inf")}},
            "model.scratch.rope_theta: inf",
        ),
        ({"model__scratch": {"x": [1, 2**70]}}, "model.scratch.x.1: "),
        ({"outdir": ""}, "outdir: ''. Expected a folder of its own"),
        ({"outdir": "/"}, "outdir: '/'. Expected a folder of its own"),
        ({"outdir": "/tmp/.."}, "outdir: '/tmp/..'. Expected a folder of its own"),
        ({"outdir": "a{x}"}, "outdir: 'a{x}'. Expected printable characters, and none of { } < >"),
        ({"outdir": "a<b>"}, "outdir: 'a<b>'. Expected"),
        ({"outdir": "a\0b"}, "outdir: 'a\\x00b'. Expected printable"),
        (
            {"outdir": "~nobody-of-this-name/x"},
            "outdir: '~nobody-of-this-name/x'. Expected a folder, and ~ only",
        ),
        ({"outdir": "s3://bucket/x"}, "outdir: 's3://bucket/x'. Expected a folder of this machine"),
        ({"corpus__text_field": "a\ud800"}, "corpus.text_field: 'a\\ud800'. Expected valid UTF-8"),
    ],
)
def test_a_value_that_cannot_be_meant(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.validate(changed(**change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_largest_seed_is_one() -> None:
    assert config.validate(changed(seed=2**63 - 1)).seed == 2**63 - 1


def test_the_outdir_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = config.validate(changed(outdir="~/x", model__pretrained="~/m"))
    assert found.outdir == f"{tmp_path}/x" and found.model.pretrained == f"{tmp_path}/m"
    (tmp_path / "mine.yaml").write_text("outdir: ~/x\n")
    assert which_run.configured([tmp_path / "mine.yaml"]) == tmp_path / "x"


@pytest.mark.parametrize(
    ("k", "top_k", "expected"),
    [
        (4, [1, 2, 4, "all"], [1, 2, 4]),  # the demo's
        (8, [1, 2, 4, "all"], [1, 2, 4, 8]),
        (8, "all", [8]),
        (8, ["all", 1], [8, 1]),
        (2, [1, 2, 4, "all"], [1, 2, 4]),
        (3, [1, 9, "all"], [1, 9]),
    ],
)
def test_top_k_tries_all_experts(k: int, top_k: Any, expected: list[int]) -> None:
    assert config.validate(changed(cluster__k=k, route__top_k=top_k)).route.top_k == expected


# --- YAML and the command line ------------------------------------------------------------------------------


# ten lines of 10^9 values
LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + inner] * 9)}]\n"
    for name, inner in zip("bcdefghij", "abcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus:\n  train: [a\nseed: 1\n", "not YAML in line "),
        ("corpus:\n\ttrain: a\n", "not YAML in line 2"),
        ("corpus: &a {train: *a}\n", "holds itself"),
        ("a: &a [*a]\n", "holds itself"),
        ("a: " + "[" * 10_000, "nested too deep"),
        (LAUGHS, "more than"),
        ("a: 2024-13-45\n", "month must be"),
        ("? [a]\n: 1\n", "not YAML in line 1"),
        ("a: \x00", "not YAML"),
    ],
)
def test_a_config_is_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for read in (
        config.read,
        lambda path: planned.read_config([str(path)]),
        lambda p: which_run.configured([p]),
    ):
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_config_is_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        with pytest.raises(
            ValueError, match=r"\.yaml: not a file\. Expected the keys of config\.yaml in a file"
        ):
            read_yaml.read(tmp_path / name)


def test_a_config_has_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert read_yaml.read(tmp_path / "mine.yaml") == {"seed": 3}


def test_a_target_stands_after_configfile() -> None:
    with pytest.raises(
        ValueError, match=r"^results/x\.html: No such file.* snakemake TARGET --configfile mine"
    ):
        planned.read_config(["results/x.html"])


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["cluster={k: 8}"], {"cluster": {"k": 8}}),
        (['cluster={"k": 8, "balance": "none"}', "seed=3"], {"cluster": {"k": 8, "balance": "none"}}),
        (["route={top_k: [1, all], temperature: 0.1}"], {"route": {"top_k": [1, "all"], "temperature": 0.1}}),
        (
            ["eval={max_document_tokens: null, merge: true}"],
            {"eval": {"max_document_tokens": None, "merge": True}},
        ),
        (
            ["corpus={text_field: '5'}", "corpus={id_field: x}"],
            {"corpus": {"text_field": "5", "id_field": "x"}},
        ),
        (["outdir=x", "seed=", "cluster={k: 8"], {}),
        (None, {}),
    ],
)
def test_a_section_is_given_on_the_command_line(entries: Any, expected: Any) -> None:
    assert planned.given(entries) == expected


def test_a_key_is_given_twice_on_the_command_line() -> None:
    with pytest.raises(
        ValueError, match="--config cluster: k in line 1 and again in line 1. Expected each key once"
    ):
        planned.given(["cluster={k: 8, k: 9}"])


@pytest.mark.slow
def test_a_run_is_started_from_another_folder_on_a_corpus_with_strange_names(tmp_path: Path) -> None:
    make_project(tmp_path / "project")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "project/corpus.jsonl").rename(elsewhere / "c{x}<results>.jsonl")
    printed = snakemake(
        elsewhere,
        *("-n", "-s", str(ROOT / "workflow/Snakefile"), "--config"),
        *("cluster={k: 3}", 'corpus={train: ["c{x}<results>.jsonl"]}'),
        configfiles=[str(tmp_path / "project/small.yaml")],
    )
    assert "workflow/profiles/default" in printed and "9 train_expert" in printed
    assert "Error" not in printed and not (elsewhere / "results").exists()


# --- what to do about a damaged file ------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a run that was started with `outdir: out`, by its absolute path."""
    monkeypatch.chdir(tmp_path)
    config.write(config.validate(changed(outdir="out")), "out/config.json")
    artifact.write_json("out/experts/3/config.json", {"model_type": "llama"})
    return tmp_path / "out"


def test_the_advice_for_a_damaged_file_names_the_config_of_its_run(run: Path) -> None:
    again = "Make it again: snakemake --cores 2 --configfile out/config.json --force"
    assert errors.make_again(run / "scores/3.npz") == f"{again} out/scores/3.npz"
    assert errors.make_again("out/experts/3/model.safetensors") == f"{again} out/experts/3/model.safetensors"
    assert errors.make_again("out/tokenizer/card.json") == f"{again} out/tokenizer/tokenizer.json"
    run.rename(run.with_name("moved"))  # its config names a folder that it does not lie in
    assert (
        errors.make_again("moved/scores/3.npz")
        == "Make it again: snakemake --cores 2 --force moved/scores/3.npz"
    )


def test_weights_that_are_fine_are_not_made_again_by_force(run: Path) -> None:
    """The card is damaged, or the weights are of another cluster: a start knows what to do."""
    advice = errors.make_again(run / "experts/3/card.json")
    assert advice.startswith("Bring it back from a copy, or train the model again: snakemake ")
    with pytest.raises(ValueError) as error:
        artifact.check_made_from(
            run / "experts/3/card.json", {"made_from": {"tokenizer": "a"}}, "tokenizer", "b"
        )
    assert str(error.value).endswith(
        "Start the run again, which makes what does not fit: snakemake --cores 2 --configfile out/config.json"
    )


# --- folders, locks, rights ---------------------------------------------------------------------------------


def test_weights_have_the_rights_of_the_other_files(tmp_path: Path) -> None:
    with publish(tmp_path / "model.safetensors") as tmp:
        save_file({"a": np.zeros(3, np.float32)}, tmp)
    (tmp_path / "other").write_text("")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model.safetensors", "other")]
    assert rights[0] == rights[1]
    (tmp_path / "mine").touch(0o600)
    with publish(tmp_path / "linked") as tmp:
        tmp.hardlink_to(tmp_path / "mine")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600


def test_a_terminal_was_closed_and_status_says_that_nothing_runs(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    record = {"host": socket.gethostname(), "pid": ended.pid}
    path = tmp_path / ".lock"
    now = path.touch() or path.stat().st_mtime
    for pid, host, expected in (
        (ended.pid, record["host"], False),
        (os.getpid(), record["host"], True),
        (ended.pid, "another", True),  # nobody here knows
    ):
        path.write_text(json.dumps({"host": host, "pid": pid, "beat": 3}))
        assert (run_state.holder(path, now) is not None) == expected
        assert run_state.is_live(path, now, now) == expected


def test_a_second_run_on_one_outdir_is_told_who_works_there() -> None:
    record = '{"host": "node7", "pid": 123, "beat": 3}'
    assert lock.who(record) == "process 123 on node7"
    assert (
        lock.who('{"host": "node7", "pid": 123, "slurm_job": "45"}')
        == "process 123 on node7, job 45 of Slurm"
    )
    assert lock.who("") == "just starting or ending" and lock.who("{broken") == "{broken"


SHARED = """
from cbtm_pipeline.base import cli
from cbtm_pipeline.corpus import shard_workers

def main():
    with shard_workers.workers(2) as each:
        print(list(each(abs, [1])))

cli.run(main)
"""


def test_shared_memory_cannot_be_used() -> None:
    """As where no file can be made there: no file of this process may have a byte."""
    run = subprocess.run(
        [sys.executable, "-c", SHARED],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("/dev/shm: File too large. Expected shared memory for worker processes.")


# --- Slurm's parts ------------------------------------------------------------------------------------------


def test_doctor_looks_at_a_local_run_where_slurm_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("sbatch", "scontrol", "sinfo", "squeue"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.chdir(make_project(tmp_path / "project"))
    monkeypatch.setattr("sys.argv", ["cbtm doctor", "--configfile", "small.yaml"])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    printed = capsys.readouterr().out
    assert (
        end.value.code == 0
        and "ok    a run on this machine: for one on Slurm, add --profile slurm." in printed
    )
    monkeypatch.setattr("sys.argv", [*sys.argv, "--profile", "slurm"])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 1 and "FAIL  Slurm: no " in capsys.readouterr().out


def test_the_profile_for_small_nodes_has_the_rules_of_the_other_and_fits(tmp_path: Path) -> None:
    large, small = (
        yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text())
        for name in ("slurm", "slurm-small")
    )
    assert large.keys() == small.keys() and large["set-threads"].keys() == small["set-threads"].keys()
    assert large["default-resources"].keys() == small["default-resources"].keys()
    rules = [small["default-resources"], *small["set-resources"].values()]
    assert all(rule.get("mem_mb", 0) <= 8192 and rule.get("gpus", 0) <= 1 for rule in rules)
    assert all(threads <= 4 for threads in small["set-threads"].values())
    gpus = {rule for rule, keys in large["set-resources"].items() if "gpus" in keys}
    assert gpus == {rule for rule, keys in small["set-resources"].items() if "gpus" in keys}


def test_setup_gives_the_profile_its_short_name(tmp_path: Path) -> None:
    (tmp_path / "profiles/slurm").mkdir(parents=True)
    for _ in range(2):
        subprocess.run(
            ["make", "-f", ROOT / "Makefile", "slurm"], cwd=tmp_path, check=True, capture_output=True
        )
    assert (tmp_path / "slurm").readlink() == Path("profiles/slurm")
    assert "/slurm" in (ROOT / ".gitignore").read_text().splitlines()


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_and_a_closed_terminal_save_the_training(tmp_path: Path) -> None:
    """Also where only Snakemake gets the signal; and a second run meanwhile is one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a script ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    project = make_project(tmp_path / "project", train={"steps": 10**6}, run={"checkpoint_seconds": 600})
    seed, log = (
        project / "results/experts/seed/model.safetensors",
        project / "results/work/seed/state/metrics.jsonl",
    )
    for number, everybody in ((signal.SIGINT, False), (signal.SIGHUP, True)):
        words = [sys.executable, "-m", "snakemake", "--cores", "2", str(seed.relative_to(project))]
        process = subprocess.Popen(
            [*words, "--configfile", "small.yaml"],
            cwd=project,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            before = log.stat().st_size if log.exists() else 0
            wait_until(lambda: log.exists() and log.stat().st_size > before, process)  # noqa: B023
            if not everybody:
                second = snakemake(project, "--cores", "1", ok=False)
                assert second.splitlines()[-1].startswith("results: another run is writing here (process ")
                assert "Traceback" not in second
            (os.killpg if everybody else os.kill)(process.pid, number)
            process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(project / "results/work/seed/.lock"), None)
        state = max((project / "results/work/seed/state").glob("step-*.safetensors"))
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert state.name == f"step-{steps[-1]:08d}.safetensors"
        status = subprocess.run(
            [sys.executable, "-m", "cbtm_pipeline.status", "results"],
            cwd=project,
            capture_output=True,
            text=True,
        )
        assert "running" not in status.stdout and "stopped" in status.stdout, status.stdout


def alive(path: Path) -> bool:
    return run_state.holder(path, path.stat().st_mtime) is not None


def wait_until(condition: Any, process: subprocess.Popen | None) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("not within 300 s")
