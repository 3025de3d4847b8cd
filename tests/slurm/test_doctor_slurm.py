"""The doctor on a real Slurm: a good profile passes, each fault of a job or of the site is found by name."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline import doctor
from cbtm_pipeline.ops import facts, run_checks, slurm_checks
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import PlannedJob
from made_run import make_config

from .box import Box
from .runs import make_slurm_project, write_profile


@pytest.fixture
def on_box(box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, box.env[name])
    return box


@pytest.fixture
def project(on_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_slurm_project(tmp_path / "project", n_steps=4)
    write_profile(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return folder


BAD = {
    "AccountingStorageEnforce": "associations,qos",
    "PreemptMode": "SUSPEND,GANG",
    "MinJobAge": "30",
}


@pytest.fixture
def bad_box(on_box: Box) -> Iterator[Box]:
    """Its controller is restarted with BAD settings, and partition preemptc suspends."""
    before = on_box.conf.read_text()
    text = re.sub(rf"^({'|'.join(BAD)})=.*\n", "", before, flags=re.M).replace(
        "PreemptMode=CANCEL", "PreemptMode=SUSPEND"
    )
    on_box.kill_slurmctld()
    on_box.conf.write_text("".join(f"{key}={value}\n" for key, value in BAD.items()) + text)
    on_box.clear()
    yield on_box
    on_box.kill_slurmctld()
    on_box.conf.write_text(before)


def training(threads: int = 2, **resources: Any) -> PlannedJob:
    return PlannedJob(
        "train_expert",
        {"slurm_partition": "gpu", "runtime": 60, "mem_mb": 2000, "gpus": 1, **resources},
        threads,
        True,
    )


def known(**resources: Any) -> Facts:
    """What is known of Slurm, and one training that asks for `resources`."""
    found = Facts([], "slurm", make_config())
    assert [level for level, _ in slurm_checks.check_slurm(found)] == ["ok"]
    found.jobs = [training(**resources)]
    return found


def examine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: str
) -> tuple[Any, list[str]]:
    monkeypatch.setattr("sys.argv", ["cbtm doctor", *args])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    return end.value.code, capsys.readouterr().out.splitlines()


def test_a_good_profile_passes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (project / "enough.yaml").write_text("train: {steps: 100000}\n")  # tokens for experts to win
    args = ["--profile", "slurm", "--configfile", "small.yaml", "enough.yaml"]
    code, lines = examine(monkeypatch, capsys, *args)
    assert code == 0, lines
    assert {line.split()[0] for line in lines[: lines.index("")]} == {"ok"}
    assert "ok    profile: slurm/config.yaml; 11 rules go to Slurm." in lines
    assert "ok    train_expert: gpu takes 1 GPU, 1 CPU, 1000 MB, 30 min." in lines
    assert any(line.startswith("ok    Slurm: inside job 7.") for line in lines)
    assert "jobs       45 on Slurm: 18 train_expert, 18 score_expert, 9 of other rules" in lines
    assert any(line.startswith("GPU-hours ") and "A100 (assumed: fake" in line for line in lines)


def test_a_profile_that_snakemake_does_not_find(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (project / "slurm/config.yaml").rename(project / "slurm/other.yaml")
    code, lines = examine(monkeypatch, capsys, "--profile", "slurm", "--configfile", "small.yaml")
    assert code == 1
    assert any(
        line.startswith("FAIL  profile: no slurm.") and line.endswith("Run ln -s profiles/slurm slurm.")
        for line in lines
    )
    # and what profiles/slurm asks for is checked all the same
    assert any(
        line.startswith("FAIL  train_expert: mem_mb: 64000. Expected 8192 or less, as a node of gpu")
        for line in lines
    )


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "ok", "gpu takes 1 GPU, 2 CPU"),
    ({"slurm_partition": "preempt,high"}, "ok", "preempt,high takes"),
    ({"slurm_partition": "gpu,short"}, "ok", "gpu,short takes"),  # it can start in one of them
    ({"slurm_partition": "gpu,nope"}, "FAIL", "invalid partition specified"),
    ({"slurm_partition": "nope"}, "FAIL", "slurm_partition: nope. Expected one of gpu, high,"),
    ({"gpu_model": "a100"}, "FAIL", "gpu_model: a100. Expected fake"),
    ({"gpus": 3}, "FAIL", "gpus: 3. Expected 2 or less"),
    ({"nodes": 5}, "FAIL", "nodes: 5. Expected 4 or less"),
    (
        {"slurm_partition": "short"},
        "FAIL",
        "runtime: 60 minutes. Expected 1 or less, or jobs wait in short for ever",
    ),
    ({"gpus": 2, "nodes": 4, "threads": 3}, "FAIL", "threads: 6 (3 for each of 2 tasks). Expected 4 or less"),
    ({"gpus": 2, "nodes": 4, "threads": 1, "slurm_partition": "high"}, "ok", "high takes 2 GPU"),
    ({"constraint": "big"}, "FAIL", "Invalid feature"),  # what only sbatch knows
    ({"slurm_extra": "--reservation=mine"}, "FAIL", "reservation"),
    ({"slurm_extra": "exclude"}, "FAIL", "slurm_extra: exclude"),
    ({"slurm_account": "nope"}, "warn", "slurm_account: nope, which Slurm lets pass"),
]


def test_jobs_that_slurm_would_take_or_not(on_box: Box) -> None:
    found, before = known(), {job["JobID"] for job in on_box.squeue("--states=all")}
    for resources, level, words in CASES:
        found.jobs = [training(**resources)]
        first, *_ = slurm_checks.check_jobs(found)
        assert first[0] == level and first[1].startswith("train_expert: ") and words in first[1], first
    assert {job["JobID"] for job in on_box.squeue("--states=all")} <= before  # nothing was submitted


def test_more_gpus_than_sequences_in_a_batch(on_box: Box) -> None:
    found = known(gpus=2, nodes=4, threads=1)
    found.config = make_config(train={"batch_size": 28})
    ((level, text),) = slurm_checks.check_jobs(found)
    assert level == "FAIL" and "gpus: 8. Expected at most 7, the sequences in a batch of 0." in text


def test_a_preempted_job_is_requeued_or_ends(on_box: Box) -> None:
    for partition, level in (("preempt", "ok"), ("preemptc", "warn"), ("high", "ok"), ("nope", None)):
        lines = list(slurm_checks.check_stops(known(slurm_partition=partition)))
        assert [found for found, _ in lines] == ([level] if level else [])


def test_little_time_to_save(on_box: Box) -> None:
    """Between KillWait, 5 s, and the notice of 120 s; then beyond both, and saving most of the time."""
    found = known()
    assert next(run_checks.check_model(found))[0] == "ok" and found.model
    for seconds, words in (
        (1, []),
        (20, ["preemption"]),
        (30, ["preemption", "checkpoint_"]),
        (600, ["limit", "preemption", "checkpoint_"]),
    ):
        found.write_rate = 12 * found.model.n_parameters / seconds
        lines = [text for level, text in slurm_checks.check_stops(found) if level == "warn"]
        assert len(lines) == len(words) and all(
            word in line for word, line in zip(words, lines, strict=True)
        ), lines


def test_nodes_that_are_down(on_box: Box) -> None:
    on_box.run("scontrol", "update", "nodename=gpu[1-4]", "state=down", "reason=test")
    try:
        found = list(slurm_checks.check_jobs(known()))
        assert found[0][0] == "warn" and "the nodes of gpu that fit are down. Expected 1 up" in found[0][1], (
            found
        )
    finally:
        on_box.run("scontrol", "update", "nodename=gpu[1-4]", "state=resume")


def test_a_slurm_that_is_set_up_for_other_work(bad_box: Box) -> None:
    bad_box.run("sacctmgr", "--immediate", "add", "account", "lab")
    bad_box.run("sacctmgr", "--immediate", "add", "user", "root", "account=lab")

    def found(**resources: Any) -> Line:
        (line,) = slurm_checks.check_jobs(known(**resources))
        return line

    assert found(slurm_account="lab")[0] == "ok"
    level, text = found(slurm_account="nope")
    assert level == "FAIL" and "slurm_account: nope, which Slurm refuses. Expected lab, root." in text
    level, text = found(slurm_account="lab", qos="fast")
    assert level == "FAIL" and "qos: fast, which Slurm refuses. Expected normal." in text
    bad_box.run("sacctmgr", "--immediate", "delete", "user", "root", "account=lab")
    bad_box.run("sacctmgr", "--immediate", "delete", "account", "lab")

    assert [level for level, _ in slurm_checks.check_stops(known(slurm_partition="preemptc"))] == ["FAIL"]
    assert [level for level, _ in slurm_checks.check_stops(known(slurm_partition="preemptc", gpus=0))] == [
        "warn"
    ]

    assert [level for level, _ in slurm_checks.check_records(known())] == ["warn", "ok"]
    bad_box.signal("slurmdbd", signal.SIGKILL)
    (age, _), (accounting, text) = slurm_checks.check_records(known())
    assert (age, accounting) == ("warn", "warn") and text.startswith("accounting: sacct: ")
    bad_box.kill_slurmctld()
    ((level, text),) = slurm_checks.check_slurm(Facts([], "slurm"))
    assert level == "FAIL" and "is DOWN" in text


def test_no_controller(
    project: Path, on_box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All other checks run all the same. The doctor gives up a controller that hangs after TIMEOUT_S."""
    monkeypatch.setattr(facts, "TIMEOUT_S", 1)
    on_box.signal("slurmctld", signal.SIGSTOP)
    code, lines = examine(monkeypatch, capsys, "--profile", "slurm", "--configfile", "small.yaml")
    failed = [line for line in lines if line.startswith("FAIL")]
    assert (
        code == 1
        and len(failed) == 1
        and failed[0].startswith("FAIL  Slurm: scontrol: no answer within 1 s.")
    )
    assert any(line.startswith("ok    profile:") for line in lines) and any(
        line.startswith("ok    disk:") for line in lines
    )
