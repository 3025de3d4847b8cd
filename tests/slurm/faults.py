"""What a cluster does to trainings, done to real ones on the box; each must end with the weights of an undisturbed run.

    python tests/slurm/faults.py          # prints the table: fault, steps lost, seconds lost, outcome

Steps lost: those done before the fault that were done again. Seconds lost: from the fault to the first step beyond where the training was,
whatever the reason (Slurm's own pauses, the start of Python, steps done again).
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    __package__ = "slurm"
    import slurm  # noqa: F401

from conftest import snakemake

from .box import Box, install, wait
from .runs import Run, alive, make_slurm_project

N_STEPS = 2000  # of an expert; dense-steps has eight times as many, and outlives three time limits of a minute
AT = 500  # the step at which the fault comes


class Outcome(NamedTuple):
    """What a fault did. `same`: the weights are those of an undisturbed run, bit by bit."""

    fault: str
    same: bool
    steps_lost: int
    seconds_lost: float
    n_jobs: int
    n_starts: int
    run: Run


class Fault(NamedTuple):
    """`strike` does it, and returns when the training is going on or over; the expert and its resources say where."""

    name: str
    strike: Callable[[Run], None]
    expert: str = "0"
    resources: dict = {}  # noqa: RUF012


def gone(run: Run, pid: int) -> None:
    wait(lambda: not alive(pid), 60, f"the end of process {pid}")
    run.reached = run.step()  # type: ignore[attr-defined]


def preempted(run: Run) -> None:
    """A job of a higher partition takes both GPUs of the node."""
    pid = run.trainer()
    command = ["sbatch", "--partition=high", f"--nodelist={run.node}", "--gpus-per-node=2", "--time=1", "--output=/dev/null"]
    run.box.run(*command, "--wrap=sleep 2")
    gone(run, pid)


def requeued(run: Run) -> None:
    pid = run.trainer()
    run.box.run("scontrol", "requeue", run.job_id)
    gone(run, pid)


def trainer_killed(run: Run) -> None:
    pid = run.trainer()
    os.kill(pid, signal.SIGKILL)
    gone(run, pid)


def node_lost(run: Run) -> None:
    """Power cut: the node's daemon and everything on it ends without a word, and comes back later."""
    pid, node = run.trainer(), run.node
    run.box.kill_slurmd(node)
    gone(run, pid)
    run.reach_starts(2)
    run.box.start_slurmd(node)


def node_cut_off(run: Run) -> None:
    """Slurm takes the node for lost and starts the job on another one, while the first training lives on."""
    node = run.node
    run.box.kill_slurmd(node, with_jobs=False)
    run.reach_starts(2)
    run.reached = run.step()  # type: ignore[attr-defined]
    run.box.start_slurmd(node)


def three_time_limits(run: Run) -> None:
    run.reached = 0  # type: ignore[attr-defined]
    run.reach_starts(4)


def cancelled_and_started_again(run: Run) -> None:
    pid = run.trainer()
    run.box.run("scancel", run.job_id)
    gone(run, pid)
    run.finish(ok=False)
    run.start()


def interrupted_and_started_again(run: Run) -> None:
    """Ctrl-C: every process at the terminal gets SIGINT."""
    pid, job_id = run.trainer(), run.job_id
    run.kill(signal.SIGINT, everything=True)
    run.finish(ok=False, timeout=30)
    wait(lambda: run.box.state(job_id).startswith("CANCEL"), 30, "the job's cancellation")
    gone(run, pid)
    run.start()


def snakemake_killed(run: Run) -> None:
    run.kill(signal.SIGKILL)
    run.start()


def snakemake_killed_until_the_end(run: Run) -> None:
    """kill -9 to Snakemake and the launcher; they start again when the job is long over."""
    run.kill(signal.SIGKILL, everything=True)
    wait(lambda: run.box.state(run.job_id) == "COMPLETED", 120, "the job's end")
    run.start()


def controller_restarted(run: Run) -> None:
    run.box.kill_slurmctld()
    time.sleep(15)
    run.box.start_slurmctld()


# Lanes run side by side, each on nodes of its own; the faults of a lane one after the other.
LANES = [
    [Fault("three time limits in a row", three_time_limits, "dense-steps", {"slurm_partition": "short", "runtime": 1, "notice_s": 20})],
    [
        Fault("node lost (power cut), back later", node_lost, resources={"slurm_extra": "--exclude=gpu3,gpu4"}),
        Fault("node cut off, training lives on", node_cut_off, "dense-steps", {"slurm_extra": "--exclude=gpu3,gpu4"}),
    ],
    [
        Fault("preempted, requeued by Slurm", preempted, resources={"slurm_partition": "preempt", "slurm_extra": "--nodelist=gpu3"}),
        Fault("preempted, cancelled by Slurm", preempted, resources={"slurm_partition": "preemptc", "slurm_extra": "--nodelist=gpu3"}),
        Fault("scontrol requeue", requeued),
        Fault("SIGKILL of the training process", trainer_killed),
        Fault("scancel, then started again", cancelled_and_started_again),
        Fault("Ctrl-C, then started again", interrupted_and_started_again),
        Fault("Snakemake killed -9, started again", snakemake_killed),
        Fault("Snakemake and launcher killed -9, started again after the job's end", snakemake_killed_until_the_end),
    ],
]


def suffer(box: Box, original: Path, folder: Path, fault: Fault) -> Outcome:
    """Run a training up to step AT, strike, wait for its end."""
    run = Run.of_copy(box, original, folder, fault.expert, **fault.resources)
    run.start()
    run.reach(1 if fault.strike is three_time_limits else AT)
    run.reached = run.step()  # type: ignore[attr-defined]
    struck = time.time()
    fault.strike(run)
    run.finish()
    return outcome(run, original, fault.name, struck)


def outcome(run: Run, original: Path, name: str, struck: float) -> Outcome:
    rows, starts = run.rows(), run.events("started")
    resumed = [row["step"] or 0 for row in starts[1:]]
    reached = min(run.reached, len(rows) - 1)  # type: ignore[attr-defined]
    seconds = rows[reached]["time"] - struck
    if len(resumed) > 1:  # several stops, none of which we caused
        reached, seconds = resumed[0], sum(rows[step]["time"] - rows[step - 1]["time"] for step in resumed)
    return Outcome(
        name,
        run.weights.read_bytes() == (original / "undisturbed" / f"{run.expert}.safetensors").read_bytes(),
        max(0, reached - resumed[0]) if resumed else 0,
        max(0.0, seconds),
        len(run.events("submitted")),
        len(starts),
        run,
    )


def prepare(folder: Path) -> Path:
    """A project in which everything but the experts is there, and the weights of undisturbed trainings without Slurm."""
    project = make_slurm_project(folder, N_STEPS)
    (project / "undisturbed").mkdir()
    names = ["0", "dense-steps"]
    targets = [f"results/experts/{name}/model.safetensors" for name in names]
    snakemake(project, *targets, "--cores", "2")
    for name, target in zip(names, targets, strict=True):
        (project / target).rename(project / f"undisturbed/{name}.safetensors")
        shutil.rmtree(project / f"results/experts/{name}")
    return project


def all_faults(box: Box, folder: Path) -> Iterator[Outcome]:
    original = prepare(folder / "original")

    def lane(number: int) -> list[Outcome]:
        return [suffer(box, original, folder / f"lane{number}-{i}", fault) for i, fault in enumerate(LANES[number])]

    with ThreadPoolExecutor() as pool:
        for outcomes in pool.map(lane, range(len(LANES))):
            yield from outcomes
    yield from controller_faults(box, original, folder)


def controller_faults(box: Box, original: Path, folder: Path) -> list[Outcome]:
    """Both at once: a training under way and one to be submitted meet a controller that is away for 15 seconds."""
    under_way = Run.of_copy(box, original, folder / "under-way", "0")
    to_come = Run.of_copy(box, original, folder / "to-come", "0")
    under_way.start()
    under_way.reach(AT)
    under_way.reached, to_come.reached = under_way.step(), 0  # type: ignore[attr-defined]
    struck = time.time()
    box.kill_slurmctld()
    to_come.start()
    time.sleep(15)
    box.start_slurmctld()
    under_way.finish()
    to_come.finish()
    return [
        outcome(under_way, original, "slurmctld away for 15 s in mid-run", struck),
        outcome(to_come, original, "slurmctld away for 15 s at submission", struck),
    ]


def main() -> None:
    if reason := install():
        sys.exit(f"Slurm: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder, "box"))
        box.start()
        try:
            for o in all_faults(box, Path(folder)):
                same = "bit-identical" if o.same else "OTHER WEIGHTS"
                print(
                    f"| {o.fault} | {o.steps_lost} | {o.seconds_lost:.0f} | {same}; {o.n_jobs} job(s), {o.n_starts} start(s) |", flush=True
                )
        finally:
            box.stop()


if __name__ == "__main__":
    main()
