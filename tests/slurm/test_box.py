"""The box is a real cluster: jobs, GPUs, preemption, lost nodes and accounting work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .box import DAEMONS, NODES, Box
from .machine import alive, install, wait


def submit(box: Box, script: str, *options: str) -> str:
    return box.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")


def test_one_task_on_every_node(box: Box) -> None:
    assert sorted(box.run("srun", "--nodes=4", "printenv", "SLURMD_NODENAME").split()) == list(NODES)


def test_jobs_on_a_node_share_its_gpus(box: Box, tmp_path: Path) -> None:
    script = f"echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_JOB_ID; sleep 600"
    first, second, third = (submit(box, script, "--nodelist=gpu1", "--gpus=1") for _ in range(3))
    wait(lambda: box.state(first) == box.state(second) == "RUNNING")
    wait(lambda: len([path for path in tmp_path.iterdir() if path.stat().st_size]) == 2)
    assert {(tmp_path / job).read_text() for job in (first, second)} == {"0\n", "1\n"}
    assert box.state(third) == "PENDING"
    assert box.run("srun", "--nodelist=gpu2", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES") == "0,1"


def test_the_high_partition_preempts(box: Box) -> None:
    requeued = submit(box, "sleep 600", "--partition=preempt", "--nodelist=gpu1", "--exclusive")
    cancelled = submit(box, "sleep 600", "--partition=preemptc", "--nodelist=gpu2", "--exclusive")
    wait(lambda: box.state(requeued) == box.state(cancelled) == "RUNNING")
    high = submit(
        box,
        "sleep 1",
        "--partition=high",
        "--nodelist=gpu1,gpu2",
        "--nodes=2",
        "--exclusive",
        "--comment=first",
    )
    wait(lambda: box.state(high) == "COMPLETED")
    assert box.state(cancelled) == "PREEMPTED"
    (row,) = box.squeue(f"--jobs={requeued}")
    assert (row["State"], row["RestartCnt"]) == ("PENDING", "1")
    box.pull_forward(requeued)
    wait(lambda: box.state(requeued) == "RUNNING", 10)
    wait(lambda: box.sacct(f"--jobs={high}")[0]["State"] == "COMPLETED")
    assert box.sacct(f"--jobs={high}")[0]["Comment"] == "first"


def test_a_lost_node_requeues_its_job_and_comes_back(box: Box, tmp_path: Path) -> None:
    job = submit(box, f"echo $$ > {tmp_path}/pid; sleep 600", "--nodelist=gpu3")
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert pid in box.job_pids("gpu3")
    box.lose_node("gpu3")
    assert not alive(pid)
    wait(lambda: box.state(job) == "PENDING")
    box.start_slurmd("gpu3")
    wait(lambda: box.idle_nodes() == len(NODES))


def test_nodes_that_slurm_took_out_of_service_are_idle_after_clear(box: Box) -> None:
    job = submit(box, "sleep 600", "--nodelist=gpu1")
    wait(lambda: box.state(job) == "RUNNING")
    box.run("scontrol", "update", "nodename=gpu1,gpu2", "state=drain", "reason=Duplicate jobid")

    def are_out() -> bool:
        """A node that registers comes back from `down` by itself, so it is taken out again."""
        box.run("scontrol", "update", "nodename=gpu3", "state=down", "reason=lost")
        return [box.nodes()[node] for node in NODES] == ["draining", "drained", "down", "idle"]

    wait(are_out, 30, "three nodes out of service", box.story)
    box.clear()
    assert box.nodes() == dict.fromkeys(NODES, "idle")


def test_what_was_waited_for_in_vain_says_what_is_there(box: Box) -> None:
    job = submit(box, "sleep 600", "--hold", "--job-name=waits")
    box.run("scontrol", "update", "nodename=gpu2", "state=drain", "reason=Kill task failed")
    with pytest.raises(TimeoutError) as error:
        wait(lambda: False, 0.1, "the end of the world", box.story)
    told = str(error.value).splitlines()
    assert told[0] == "the end of the world: not so after 0.1 s"
    assert "gpu2 drained Kill task failed" in told and "gpu1 idle none" in told
    assert f"{job} waits PENDING (JobHeldUser)" in str(error.value)
    assert f"_slurm_rpc_submit_batch_job: JobId={job}" in str(error.value)


def test_a_box_by_hand(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A job outlives its controller; nothing outlives the box."""
    if reason := install():
        pytest.skip(f"Slurm: {reason}")
    folder = tmp_path_factory.mktemp("hand")
    command = [sys.executable, str(Path(__file__).with_name("box.py"))]
    box = Box(folder, accounting=False)
    pids = []
    try:
        out = subprocess.run(
            [*command, "start", str(folder), "--no-accounting"], check=True, capture_output=True, text=True
        ).stdout
        assert out == f"export SLURM_CONF={folder}/slurm.conf\n"
        job = submit(box, "trap '' TERM; setsid sleep 600 & sleep 600")
        wait(lambda: box.state(job) == "RUNNING" and len(box.job_pids("gpu1")) >= 4)
        pids = [*(pid for name in DAEMONS if (pid := box.pid(name))), *box.job_pids("gpu1")]
        assert len(pids) >= 6 + 4
        box.stop_slurmctld()
        box.start_slurmctld()
        assert box.state(job) == "RUNNING"
        assert [pid for pid in pids if not alive(pid)] == pids[:1]
        box.kill_slurmctld()
        assert box.pid("slurmctld") is None
    finally:
        subprocess.run([*command, "stop", str(folder)], check=True)
    assert not any(map(alive, pids))
    assert (
        subprocess.run([*command, "status", str(folder)], capture_output=True, text=True).stdout
        == "running: nothing\n"
    )


def test_without_slurm_the_last_line_counts_the_tests() -> None:
    tests = [f"{__file__}::{test.__name__}" for test in (test_one_task_on_every_node, test_a_box_by_hand)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env={**os.environ, "CBTM_NO_SLURM": "1"}, capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.splitlines()[-1] == "Slurm: 2 tests not run: CBTM_NO_SLURM is set"
