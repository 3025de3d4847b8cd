"""Parts of the launcher that need no Slurm: requests, temporary errors, the history of a job."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.slurm import commands, events, request, task
from made_project import ROOT

GPU = {"slurm_partition": "gpu", "runtime": 1440, "mem_mb": 64000, "gpus": 2}


def test_a_training_has_one_task_per_gpu_and_notice_before_its_limit() -> None:
    asked = request.sbatch_parameters("expert-3", {**GPU, "nodes": 2, "gpu_model": "a100"}, 8, "", True)
    assert asked["job_name"] == "expert-3"
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"], asked["cpus_per_task"]) == (
        2,
        2,
        "a100:2",
        8,
    )
    assert (asked["time"], asked["mem"], asked["signal_delay_s"]) == (1440, "64000M", 120)
    assert "signal" not in asked["additional_parameters"]
    assert "--cpus-per-task=8" in asked["srun_args"]


def test_anything_else_has_one_task_and_no_notice() -> None:
    asked = request.sbatch_parameters("score-3", GPU, 1, "", False)
    assert asked["ntasks_per_node"] == 1
    assert asked["additional_parameters"]["signal"].startswith("CONT")
    assert "account" not in asked, "none was given"


def test_notice_is_a_quarter_of_a_short_limit_unless_it_is_set() -> None:
    assert request.sbatch_parameters("x", {**GPU, "runtime": 4}, 1, "", True)["signal_delay_s"] == 60
    assert request.sbatch_parameters("x", {**GPU, "notice_s": 7}, 1, "", True)["signal_delay_s"] == 7


def test_further_options_of_sbatch() -> None:
    asked = request.sbatch_parameters(
        "x", {**GPU, "slurm_extra": "--exclude=a,b --mail-type='FAIL,END' --exclusive"}, 1, "", True
    )
    more = asked["additional_parameters"]
    assert (more["exclude"], more["mail-type"], more["exclusive"]) == ("a,b", "FAIL,END", True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gpu": 1}, "gpu: unknown resource.*Did you mean gpus"),
        ({"slurm_acount": "lab"}, "slurm_acount: unknown resource.*Did you mean slurm_account"),
        ({"slurm_extra": "--time=5"}, "slurm_extra: --time=5.*Set runtime instead"),
        ({"slurm_extra": "--comment=x"}, "slurm_extra: --comment=x.*Remove it"),
        ({"slurm_extra": "-x a"}, "slurm_extra: -x"),
    ],
)
def test_wrong_resources_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request.sbatch_parameters("x", {**GPU, **wrong}, 1, "", True)
    with pytest.raises(ValueError, match="runtime: missing"):
        request.sbatch_parameters("x", {"slurm_partition": "gpu"}, 1, "", True)


def line(resources: dict, **more: object) -> list[str]:
    values = {
        "name": "x",
        "folder": "f",
        "threads": 1,
        "depends_on": "{}",
        "inputs": ["a"],
        "outputs": ["b"],
        "work": None,
        **more,
    }
    return request.command_line(resources=resources, **values)  # type: ignore[arg-type]


def test_without_a_partition_nothing_comes_before_the_command() -> None:
    assert line({"runtime": 5, "tmpdir": "/tmp"}) == line({"slurm_partition": "", "runtime": 5}) == []


def test_a_line_says_what_the_launcher_reads() -> None:
    words = line(
        {
            **GPU,
            "tmpdir": "/tmp",
            "mem": "64 GB",
            "mem_mib": 1,
            "disk_mb": 1,
            "slurm_jobs": 1,
            "_cores": 8,
            "qos": "",
        },
        work="w",
    )
    assert words[:3] == ["python", "-m", "cbtm_pipeline.slurm.launch"]
    assert words[-1] == "--"
    assert json.loads(words[words.index("--resources") + 1]) == GPU
    assert words[words.index("--work") + 1] == "w"
    assert line(GPU, depends_on="1") != line(GPU, depends_on="2")


def test_the_shipped_profile_asks_only_for_what_exists() -> None:
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    for rule in profile["set-resources"].values():
        known = {
            key: value
            for key, value in {**profile["default-resources"], **rule}.items()
            if key not in request.SNAKEMAKES
        }
        request.sbatch_parameters(
            "x", {key: value for key, value in known.items() if value != ""}, 1, "", True
        )


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "squeue: error: slurm_receive_msg: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit Job violates accounting/QOS policy",
        "scontrol: error: Unable to contact slurm controller (connect failure)",
    ],
)
def test_temporary_errors(message: str) -> None:
    assert commands.is_temporary(message)


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: invalid partition specified: nope",
        "Batch job submission failed: Invalid account or account/partition combination specified",
        "Batch job submission failed: Requested node configuration is not available",
        "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
        "sbatch: fatal: Could not establish a configuration source",
        "sbatch: error: Batch job submission failed: User's group not permitted to use this partition",
    ],
)
def test_errors_that_users_have_to_correct(message: str) -> None:
    assert not commands.is_temporary(message)


@pytest.mark.parametrize(
    "state, reason, is_held, launch_failed",
    [
        ("PENDING", "launch failed requeued held", True, True),
        ("PENDING", "launch_failed_requeued_held", True, True),
        ("PENDING", "job requeued in held state", True, False),
        ("SPECIAL_EXIT", "job requeued in held state", True, False),
        ("PENDING", "JobHeldUser", True, False),
        ("PENDING", "JobHeldAdmin", True, False),
        ("PENDING", "JobHoldMaxRequeue", True, False),
        ("COMPLETING", "launch failed requeued held", False, False),
        ("PENDING", "BeginTime", False, False),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:gpu1", False, False),
        ("RUNNING", "None", False, False),
    ],
)
def test_a_job_that_is_held_and_why(state: str, reason: str, is_held: bool, launch_failed: bool) -> None:
    job = commands.QueuedJob("17", "expert-3", state, reason, "", 1, "token", "", "")
    assert (job.is_held, job.launch_failed) == (is_held, launch_failed)


def test_a_command_that_hangs_is_unreachable_and_one_that_is_missing_is_not() -> None:
    with pytest.raises(commands.Unreachable):
        commands.ask("sleep", "5", timeout_s=0.1)
    with pytest.raises(commands.Refused, match="not found"):
        commands.ask("no-such-command-of-slurm")


def test_a_surrounding_job_does_not_bend_the_jobs() -> None:
    kept = commands.environment(
        {"SLURM_CONF": "c", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "PATH": "p", "SLURM_CPU_BIND": "y"}
    )
    assert kept == {"SLURM_CONF": "c", "PATH": "p"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12), st.one_of(st.none(), st.integers(0, 3))
)
def test_tries_are_the_last_starts_with_the_same_step(steps: list[int | None], step: int | None) -> None:
    rows = [row for s in steps for row in ({"event": "started", "step": s}, {"event": "ended", "step": 99})]
    n = events.n_tries(rows, "started", step)
    assert steps[len(steps) - n :] == [step] * n
    assert n == len(steps) or steps[len(steps) - n - 1] != step


def test_history_of_other_work_and_of_results_taken_does_not_count(tmp_path: Path) -> None:
    for event, fingerprint in [
        ("started", "a"),
        ("taken", "a"),
        ("started", "b"),
        ("started", "a"),
        ("started", "a"),
    ]:
        events.add(tmp_path, event, fingerprint=fingerprint, step=None)
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"event": "star')
    rows = events.read(tmp_path)
    assert len(rows) == 5
    assert events.n_tries(events.of_this_work(rows, "a"), "started", None) == 2


def test_saved_step_is_the_newest(tmp_path: Path) -> None:
    assert events.saved_step(None) is None
    assert events.saved_step(tmp_path) is None
    (tmp_path / "state").mkdir()
    for step in (5, 90, 100):
        (tmp_path / f"state/step-{step:08d}.safetensors").touch()
    assert events.saved_step(tmp_path) == 100


def test_other_config_or_inputs_are_other_work(tmp_path: Path) -> None:
    small, large = tmp_path / "manifest.json", tmp_path / "corpus"
    small.write_text("1")
    large.write_bytes(bytes(request.SMALL + 1))
    inputs = [str(small), str(large), str(tmp_path / "still to be made")]
    first = line(GPU, inputs=inputs)
    os.utime(small, (0, 0))
    assert line(GPU, inputs=inputs) == first, "content, not time"
    assert line(GPU, inputs=inputs, depends_on="other") != first
    assert line(GPU, inputs=inputs[:2]) != first
    small.write_text("2")
    second = line(GPU, inputs=inputs)
    assert second != first
    os.utime(large, (0, 0))
    assert line(GPU, inputs=inputs) != second
    assert len(line(GPU, inputs=inputs * 1000)) == len(first), "a command line is bounded"


@pytest.mark.parametrize(
    "visible, expected, fine",
    [("0", 1, True), ("0,1", 2, True), ("0", 2, False), ("0,1", 1, False), ("", 1, False), ("3", 0, True)],
)
def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, visible: str, expected: int, fine: bool) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (task.wrong_gpus(expected) is None) == fine


def test_kept_outputs_survive_the_deletion_of_the_first_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("x")
    task.keep([str(out), str(tmp_path / "never made")], tmp_path / "kept")
    out.unlink()
    assert [path.read_text() for path in (tmp_path / "kept").iterdir()] == ["x"]
