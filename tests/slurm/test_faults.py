"""Each fault of faults.py, inflicted on real trainings, ends with the weights of an undisturbed run."""

import signal
from pathlib import Path

import pytest

from . import faults
from .box import Box
from .faults import LANES, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AWAY = ("slurmctld away for 15 s in mid-run", "slurmctld away for 15 s at submission")
NAMES = [fault.name for lane in LANES for fault in lane]
SUBMITTED_AGAIN = {
    "preempted, cancelled by Slurm",
    "scancel, then started again",
    "Ctrl-C, then started again",
}
STARTED_ONCE = {
    *AWAY,
    "Snakemake killed -9, started again",
    "Snakemake and launcher killed -9, started again after the job's end",
}
WITHOUT_NOTICE = {
    "SIGKILL of the training process",
    "node lost (power cut), back later",
    "node cut off, training lives on",
}


@pytest.fixture(scope="module")
def outcomes(box: Box, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    suffered = faults.all_faults(box, prepared, tmp_path_factory.mktemp("faults"))
    return {outcome.fault: outcome for outcome in suffered}


def job_logs(outcome: Outcome) -> str:
    return "".join(path.read_text() for path in (outcome.run.project / "results/slurm").rglob("*_log.*"))


@pytest.mark.parametrize("name", [*NAMES, *AWAY])
def test_fault(outcomes: dict[str, Outcome], name: str) -> None:
    o = outcomes[name]
    history = o.run.project / "results/slurm" / f"expert-{o.run.expert}" / "events.jsonl"
    story = f"{o}\n{o.run.printed()}\n{history.read_text()}"
    assert o.same, story
    # Slurm 22.05 may start a job on a node whose GPUs its new controller does not know yet; that job fails.
    extra = {1} if name == AWAY[1] and "Invalid generic resource" in job_logs(o) else set()
    assert o.n_jobs - (name in SUBMITTED_AGAIN) in {1} | {1 + n for n in extra}, story
    assert o.n_starts == (1 if name in STARTED_ONCE else 2) or ("time limits" in name and o.n_starts >= 4), (
        story
    )
    if name not in WITHOUT_NOTICE:
        assert o.steps_lost <= 1, story
    assert not list((o.run.project / "results").rglob("*.tmp"))
    assert not list(o.run.work.glob("state*"))


def test_the_time_limits_were_slurms(outcomes: dict[str, Outcome]) -> None:
    ended = outcomes["three time limits in a row"].run.events("ended")
    assert [row["status"] for row in ended] == [85] * (len(ended) - 1) + [0]
    assert [row["signals"] for row in ended] == [[signal.SIGUSR2]] * (len(ended) - 1) + [[]]
    assert [row["restart"] for row in ended] == list(range(len(ended)))


def test_a_second_training_of_a_lost_node_waits_for_the_first(outcomes: dict[str, Outcome]) -> None:
    assert "waiting" in job_logs(outcomes["node cut off, training lives on"]), (
        "two trainings of one expert at the same time"
    )
