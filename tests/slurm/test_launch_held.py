"""A job that Slurm holds: released if a node failed to start it, left alone if somebody holds it."""

import json
from pathlib import Path

import pytest

from cbtm_pipeline.slurm import events, launcher

from .box import Box
from .configure import write_prolog
from .launchers import Start, end_of, says, submitted
from .machine import wait


def fail_starts(box: Box, tmp_path: Path, times: int) -> None:
    """Let so many starts of jobs fail. Each drains its node; Slurm holds the job."""
    (tmp_path / "fail").mkdir()
    for i in range(times):
        (tmp_path / f"fail/{i}").touch()
    write_prolog(box.folder, f"for f in {tmp_path}/fail/*; do rm $f && exit 1; done; exit 0")


def test_a_job_that_a_node_fails_to_start_runs_on_another_node(
    box: Box, start: Start, tmp_path: Path
) -> None:
    fail_starts(box, tmp_path, 1)
    printed = end_of(start("touch out"), 0)
    (job,) = submitted(tmp_path)
    assert f"job {job} released: a node failed to start it (launch failed requeued held)" in printed
    rows = events.read(tmp_path / "slurm/job")
    assert [row["event"] for row in rows] == ["submitted", "released", "started", "ended", "taken"]
    (drained,) = [node for node, state in box.nodes().items() if state == "drained"]
    assert rows[2]["node"] != drained


@pytest.mark.slow
def test_a_job_that_no_node_can_start_is_left_to_the_user(box: Box, start: Start, tmp_path: Path) -> None:
    fail_starts(box, tmp_path, launcher.MAX_RELEASES + 1)
    waiting = start("touch out")
    printed = says(waiting, ": held (")
    (job,) = submitted(tmp_path)
    todo = f"Release it with scontrol release {job}, or cancel it."
    assert f"job {job}: held (launch failed requeued held). Expected" in printed and todo in printed
    rows = events.read(tmp_path / "slurm/job")
    assert [row["event"] for row in rows] == ["submitted"] + ["released"] * launcher.MAX_RELEASES
    box.run("scontrol", "update", "nodename=gpu1", "state=resume")
    box.run("scontrol", "release", job)
    end_of(waiting, 0)


@pytest.mark.slow
def test_a_job_that_the_user_holds_stays_held_and_is_told_of_once(
    box: Box, start: Start, tmp_path: Path
) -> None:
    waiting = start("touch out", slurm_extra="--hold")
    says(waiting, "held (JobHeldUser). Expected a job that waits for its turn.")
    (job,) = submitted(tmp_path)
    asked = [json.loads((tmp_path / "slurm/queue.json").read_text())["asked"]]

    def asks_again() -> bool:
        asked.append(json.loads((tmp_path / "slurm/queue.json").read_text())["asked"])
        return len(set(asked)) > 2

    wait(asks_again, 60)
    assert box.state(job) == "PENDING"
    box.run("scontrol", "release", job)
    assert ": held" not in end_of(waiting, 0)


@pytest.mark.slow
def test_a_job_whose_id_slurm_gave_away_is_submitted_again(box: Box, start: Start, tmp_path: Path) -> None:
    """A controller that was killed has forgotten the job, and gives the next one the same id."""
    first = start("touch out", slurm_extra="--hold")
    wait(lambda: submitted(tmp_path))
    first.kill()
    first.communicate()
    other = box.run(
        "sbatch", "--parsable", "--hold", "--output=/dev/null", f"--comment={'0' * 32}", "--wrap=true"
    )
    record = events.read_json(tmp_path / "slurm/job/job.json")
    assert record
    box.run("scancel", record["job_id"])
    events.write_json(tmp_path / "slurm/job/job.json", {**record, "job_id": other})
    second = start("touch out", slurm_extra="--hold")
    says(second, f"job {other} ended (unknown) before it was done, the next one goes on")
    wait(lambda: len(submitted(tmp_path)) == 2)
    assert box.state(other) == "PENDING"
    box.run("scontrol", "release", submitted(tmp_path)[1])
    end_of(second, 0)
