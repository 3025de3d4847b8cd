"""One launcher and its job on the box: results, failures, a second launcher, and how often Slurm is asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cbtm_pipeline.base import cli
from cbtm_pipeline.slurm import events, request

from .box import Box
from .launchers import RESOURCES, Start, end_of, says, started, submitted, when
from .machine import wait


def test_a_job_gets_what_it_asked_for_and_leaves_its_log(box: Box, start: Start, tmp_path: Path) -> None:
    end_of(
        start("env > out; echo hello", "--threads", "2", gpus=2, nodes=1, slurm_extra="--exclude=gpu1,gpu2"),
        0,
    )
    env = (tmp_path / "out").read_text()
    assert "CUDA_VISIBLE_DEVICES=0,1\n" in env
    assert "SLURM_CPUS_PER_TASK=2\n" in env
    assert "SLURM_JOB_NAME=job\n" in env
    assert "SLURMD_NODENAME=gpu3\n" in env or "SLURMD_NODENAME=gpu4\n" in env
    folder = tmp_path / "slurm/job"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", "events.jsonl", "launch.log", f"{submitted(tmp_path)[0]}_0_log.out"]
    )
    assert "hello" in next(folder.glob("*.out")).read_text()


def test_a_brief_launcher_says_that_the_job_is_submitted_and_logs_the_rest(
    box: Box, start: Start, tmp_path: Path
) -> None:
    printed = end_of(start("env > out", env={**box.env, cli.BRIEF: "1"}), 0)
    job = f"job {submitted(tmp_path)[0]}"
    assert f"{job} submitted" in printed
    lines = (tmp_path / "slurm/job/launch.log").read_text().splitlines()
    assert lines[0].endswith(f"{job} submitted") and lines[-1].endswith(f"{job} done")
    assert set(printed.splitlines()) <= set(lines)
    assert cli.BRIEF not in (tmp_path / "out").read_text(), "Slurm's own log of the job has all its lines"


def test_a_failing_module_fails_once(start: Start, tmp_path: Path) -> None:
    printed = end_of(start("echo the reason; exit 3"), 1)
    assert "exit status 3" in printed
    assert "Traceback" not in printed
    assert len(submitted(tmp_path)) == len(started(tmp_path)) == 1
    assert "the reason" in Path(tmp_path, printed.split()[-1]).read_text()


def test_a_module_that_is_always_killed_is_given_up(start: Start, tmp_path: Path) -> None:
    printed = end_of(start("kill -9 $$"), 1)
    assert f"started {events.MAX_TRIES} times" in printed
    assert len(started(tmp_path)) == events.MAX_TRIES + 1, "the last one only to say so"
    assert len(submitted(tmp_path)) == 1


def test_a_module_that_makes_progress_is_not_given_up(start: Start, tmp_path: Path) -> None:
    script = f"""
        mkdir -p {tmp_path}/work/state; cd {tmp_path}/work/state; n=$(ls | wc -l)
        [ $n = 6 ] && touch {tmp_path}/out && exit 0
        touch step-0000000$n.safetensors; kill -9 $$
    """
    end_of(start(script, "--work", str(tmp_path / "work")), 0)
    assert [row["step"] for row in started(tmp_path)] == [None, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "resources, word",
    [
        ({"slurm_partition": "nope"}, "invalid partition"),
        ({"gpus": 3}, "node configuration"),
        ({"gpu": 1}, "Did you mean gpus"),
        ({"slurm_extra": "--time=3"}, "Set runtime instead"),
        ({"slurm_extra": "-w gpu1"}, "Expected options of sbatch"),
        ({"slurm_partition": "short", "runtime": 2}, "PartitionTimeLimit"),
    ],
)
def test_what_slurm_refuses_is_one_line(start: Start, tmp_path: Path, resources: dict, word: str) -> None:
    printed = end_of(start("true", **resources), 1)
    assert word in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not (tmp_path / "slurm/job/job.json").exists()


def test_gpus_other_than_asked_for_stop_the_job(box: Box, tmp_path: Path) -> None:
    sbatch = {**request.sbatch_parameters("job", {**RESOURCES, "gpus": 1}, 1, "", False)}
    order = {
        "name": "job",
        "folder": str(tmp_path),
        "command": ["touch", str(tmp_path / "out")],
        "work": None,
        "outputs": [],
        "gpus": 2,
    }
    order |= {"fingerprint": "", "token": "t", "sbatch": sbatch}
    subprocess.run(
        [sys.executable, "-m", "cbtm_pipeline.slurm.submit"],
        input=json.dumps(order),
        text=True,
        env=box.env,
        check=True,
    )
    wait(lambda: (tmp_path / "result.json").exists())
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert "'0' on gpu" in error or "'1' on gpu" in error
    assert not (tmp_path / "out").exists()


def test_a_killed_launcher_finds_its_job_again(box: Box, start: Start, tmp_path: Path) -> None:
    first = start(when("go", "touch out"))
    wait(lambda: submitted(tmp_path))
    first.kill()
    first.communicate()
    second = start(when("go", "touch out"))
    assert says(second, "waiting again").split()[-1] == submitted(tmp_path)[0]
    (tmp_path / "go").touch()
    end_of(second, 0)
    assert len(submitted(tmp_path)) == 1


def test_a_launcher_killed_while_it_submits_leaves_one_job(box: Box, start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin/sbatch"  # Slurm's own, which does not answer until the file is there
    slow.write_text(f'#!/bin/sh\n{box.run("which", "sbatch")} "$@"\n{when(f"{tmp_path}/answer", "exit 0")}\n')
    slow.chmod(0o755)
    env = {**box.env, "PATH": f"{tmp_path}/bin:{box.env['PATH']}"}
    first = start(when("go", "touch out"), env=env)
    wait(lambda: jobs_of(box, tmp_path))
    first.kill()
    lock = ["flock", "--nonblock", str(tmp_path / "slurm/job/.lock"), "true"]
    assert subprocess.run(lock).returncode == 1  # sbatch still has the lock: the next launcher waits for it
    second = start(when("go", "touch out"), env=env)
    (tmp_path / "answer").touch()
    assert says(second, "waiting again").split()[-1] in jobs_of(box, tmp_path)
    (tmp_path / "go").touch()
    end_of(second, 0)
    assert len(jobs_of(box, tmp_path)) == 1
    first.communicate()


def jobs_of(box: Box, folder: Path) -> list[str]:
    """Jobs that were submitted from this folder."""
    ids = [row["JobID"] for row in box.squeue("--states=all", "--name=job")]
    return [job for job in ids if f"WorkDir={folder}" in box.run("scontrol", "show", "job", job)]


def test_a_result_that_nobody_took_is_taken_later(start: Start, tmp_path: Path, box: Box) -> None:
    script = when("go", "echo precious > out")
    first = start(script)
    wait(lambda: submitted(tmp_path))
    first.kill()
    first.communicate()
    (tmp_path / "go").touch()
    wait(lambda: (tmp_path / "slurm/job/result.json").exists())
    (tmp_path / "out").unlink()  # as Snakemake does with the outputs of a run that it takes for incomplete
    end_of(start(script), 0)
    assert (tmp_path / "out").read_text() == "precious\n"
    assert len(submitted(tmp_path)) == 1
    end_of(start(script), 0)
    assert len(submitted(tmp_path)) == 2, "a result that was taken is not taken again"


def test_other_work_under_the_same_name_replaces_the_job(box: Box, start: Start, tmp_path: Path) -> None:
    first = start("sleep 600", "--made-from", "old")
    wait(lambda: started(tmp_path))
    first.kill()
    first.communicate()
    end_of(start("touch out", "--made-from", "new"), 0)
    old, _ = submitted(tmp_path)
    assert box.state(old) == "CANCELLED"


def test_ctrl_c_cancels_and_any_other_end_does_not(box: Box, start: Start, tmp_path: Path) -> None:
    launcher = start("sleep 600")
    wait(lambda: started(tmp_path))
    launcher.send_signal(signal.SIGHUP)
    end_of(launcher, 143)
    job = submitted(tmp_path)[0]
    assert box.state(job) == "RUNNING"
    launcher = start("sleep 600")
    says(launcher, "waiting again")
    launcher.send_signal(signal.SIGINT)
    end_of(launcher, 130)
    wait(lambda: box.state(job) == "CANCELLED", 20)


def test_an_orphan_leaves_the_job_alone(box: Box, start: Start, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cbtm_pipeline.slurm.launch",
        "--name",
        "job",
        "--folder",
        "slurm",
        "--resources",
        json.dumps(RESOURCES),
    ]
    with subprocess.Popen(
        ["sh", "-c", '"$@" & wait', "sh", *command, "--", "sleep", "600"], cwd=tmp_path, env=box.env
    ) as parent:
        wait(lambda: started(tmp_path))
        parent.kill()
    os.set_blocking((fd := os.open(tmp_path / "slurm/job/.lock", os.O_RDWR)), True)
    subprocess.run(["flock", str(fd)], pass_fds=[fd], timeout=10, check=True)  # the orphan has released it
    os.close(fd)
    assert box.state(submitted(tmp_path)[0]) == "RUNNING"


def test_many_launchers_ask_slurm_as_little_as_one(box: Box, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    counting = tmp_path / "bin/squeue"
    counting.write_text(f'#!/bin/sh\necho >> {tmp_path}/asked\nexec {box.run("which", "squeue")} "$@"\n')
    counting.chmod(0o755)
    code = """if True:
        import sys
        from pathlib import Path
        from cbtm_pipeline.slurm import commands
        commands.QUEUE_AGE_S = float(sys.argv[2])
        for _ in range(5):
            assert isinstance(commands.shared_queue(Path(sys.argv[1])), dict)
    """
    env = {**box.env, "PATH": f"{tmp_path}/bin:{box.env['PATH']}"}

    def n_asked(queue_age_s: float) -> int:
        """How often Slurm is asked when eight processes look at the queue five times each."""
        (tmp_path / "asked").write_text("")
        command = [sys.executable, "-c", code, str(tmp_path), str(queue_age_s)]
        processes = [subprocess.Popen(command, env=env) for _ in range(8)]
        assert [process.wait(60) for process in processes] == [0] * 8
        return len((tmp_path / "asked").read_text().splitlines())

    assert n_asked(1e6) == 1  # all use the first answer
    assert n_asked(0.0) == 40  # no answer is young enough
