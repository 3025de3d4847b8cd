"""Faults of a cluster, inflicted on real trainings. Each must end with the weights of an undisturbed run.

    python tests/slurm/faults.py          # prints the table: fault, steps lost, seconds lost, outcome

Steps lost: those that had been done before the fault and were done again. Seconds lost: from the fault to the
first new step, with all that takes time in between (Slurm's own pauses, the start of Python, steps done
again).
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "helpers")]
    __package__ = "slurm"
    import slurm  # noqa: F401

from made_project import snakemake

from .box import Box
from .machine import install, wait
from .runs import Run, alive, is_pending, make_slurm_project

N_STEPS = 1000  # of an expert
AT = 200  # the step at which the fault comes


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
    """A fault. `strike` inflicts it, and returns when the training goes on or has ended.

    `expert` and `resources` say which training suffers it, and where it runs.
    """

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
    options = ("--partition=high", f"--nodelist={run.node}", "--gpus-per-node=2", "--time=1")
    run.box.run("sbatch", *options, "--output=/dev/null", "--wrap=sleep 2")
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
    """Power cut: the node's daemon and all its processes are killed, and the daemon starts again later."""
    pid, node = run.trainer(), run.node
    run.box.kill_slurmd(node)
    gone(run, pid)
    run.reach_starts(2)
    run.box.start_slurmd(node)


def node_cut_off(run: Run) -> None:
    """Slurm takes the node for lost and starts the job on another one, while the first training lives on."""
    node = run.node
    run.box.kill_slurmd(node, with_jobs=False)
    run.box.run("scontrol", "update", f"nodename={node}", "state=down", "reason=cut off")
    wait(lambda: run.box.state(run.job_id) == "PENDING", 30, "the job's return to the queue")
    run.box.pull_forward(run.job_id)
    run.reach_starts(2)


def three_time_limits(run: Run) -> None:
    """Each job holds the training up until Slurm's notice is there, 45 to 105 s after the start of the job.

    Slurm's pause before a requeued job may start is skipped.
    """
    for n in (1, 2, 3):
        run.reach(run.step() + 50)
        pid = run.trainer()
        os.kill(pid, signal.SIGSTOP)
        wait(lambda pid=pid: is_pending(pid, signal.SIGUSR2), 180, "Slurm's notice")
        os.kill(pid, signal.SIGCONT)
        wait(lambda: run.box.state(run.job_id) == "PENDING", 60, "the job's return to the queue")
        run.box.pull_forward(run.job_id)
        run.reach_starts(n + 1)
        wait(lambda before=pid: run.trainer_or_none() not in (None, before), 60, "the next training")


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
    """Snakemake and the launcher are killed with -9, and start again when the job has long ended."""
    run.kill(signal.SIGKILL, everything=True)
    wait(lambda: run.box.state(run.job_id) == "COMPLETED", 120, "the job's end")
    run.start()


# Lanes run side by side, each on its own nodes. The faults of a lane come one after another.
# Two minutes: on a busy machine, a start can take one.
LIMIT = {"runtime": 2, "notice_s": 15, "slurm_extra": "--nodelist=gpu1"}
TWO_NODES = {"slurm_extra": "--exclude=gpu1,gpu4"}
ANYWHERE_SAFE = {"gpus": 0, "slurm_extra": "--nodelist=gpu1"}
LANES = [
    [Fault("three time limits in a row", three_time_limits, resources=LIMIT)],
    [
        Fault("node lost (power cut), back later", node_lost, resources=TWO_NODES),
        Fault("node cut off, training lives on", node_cut_off, "dense", TWO_NODES),
    ],
    [
        Fault(
            "preempted, requeued by Slurm",
            preempted,
            resources={"slurm_partition": "preempt", "slurm_extra": "--nodelist=gpu4"},
        ),
        Fault(
            "preempted, cancelled by Slurm",
            preempted,
            resources={"slurm_partition": "preemptc", "slurm_extra": "--nodelist=gpu4"},
        ),
    ],
    [
        Fault("scontrol requeue", requeued, resources=ANYWHERE_SAFE),
        Fault("SIGKILL of the training process", trainer_killed, resources=ANYWHERE_SAFE),
        Fault("scancel, then started again", cancelled_and_started_again, resources=ANYWHERE_SAFE),
    ],
    [
        Fault("Ctrl-C, then started again", interrupted_and_started_again, resources=ANYWHERE_SAFE),
        Fault("Snakemake killed -9, started again", snakemake_killed, resources=ANYWHERE_SAFE),
        Fault(
            "Snakemake and launcher killed -9, started again after the job's end",
            snakemake_killed_until_the_end,
            resources=ANYWHERE_SAFE,
        ),
    ],
]


def suffer(box: Box, original: Path, folder: Path, fault: Fault) -> tuple[Run, str, float]:
    """Run a training to step AT, strike, wait for its end. Returns the run, the fault's name, its time."""
    run = Run.of_copy(box, original, folder, fault.expert, **fault.resources)
    run.start()
    run.reach(AT)
    run.reached = run.step()  # type: ignore[attr-defined]
    struck = time.time()
    fault.strike(run)
    run.finish()
    return run, fault.name, struck


def outcome(run: Run, original: Path, name: str, struck: float) -> Outcome:
    rows, starts = run.rows(), run.events("started")
    resumed = [row["step"] or 0 for row in starts[1:]]
    reached = min(run.reached, len(rows) - 1)  # type: ignore[attr-defined]
    seconds = rows[reached]["time"] - struck
    if len(resumed) > 1:  # several stops, which Slurm caused
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
    """A project that has all inputs of the experts, made without Slurm, and no expert."""
    project = make_slurm_project(folder, N_STEPS)
    (project / "undisturbed").mkdir()
    snakemake(
        project, "results/experts/seed/model.safetensors", "results/assignments/manifest.json", "--cores", "2"
    )
    return project


def train_undisturbed(original: Path, folder: Path, experts: Iterable[str]) -> None:
    """Train without Slurm and without faults, and keep the weights."""
    shutil.copytree(original, folder, symlinks=True)
    for expert in experts:
        target = f"results/experts/{expert}/model.safetensors"
        snakemake(folder, target, "--cores", "1")
        (folder / target).rename(original / f"undisturbed/{expert}.safetensors")


def all_faults(box: Box, original: Path, folder: Path) -> Iterator[Outcome]:
    """Inflict each fault on a copy of `original`, which `prepare` has made."""

    def lane(number: int) -> list[tuple[Run, str, float]]:
        return [
            suffer(box, original, folder / f"lane{number}-{i}", fault)
            for i, fault in enumerate(LANES[number])
        ]

    # With more at once on two cores, the start of Python alone takes as long as the time limit of a fault.
    with ThreadPoolExecutor(2) as pool:
        undisturbed = pool.submit(train_undisturbed, original, folder / "alone", ["0", "dense"])
        suffered = [each for each_lane in pool.map(lane, range(len(LANES))) for each in each_lane]
        suffered += controller_faults(box, original, folder)
        undisturbed.result()
    for run, name, struck in suffered:
        yield outcome(run, original, name, struck)


def controller_faults(box: Box, original: Path, folder: Path) -> list[tuple[Run, str, float]]:
    """A running training and one that is to be submitted meet a controller that is away for 15 seconds.

    The running one is the slow dense expert: it must not end before the nodes have registered again. After
    such an end, Slurm 22.05 starts the next job on a node whose GPUs it does not know yet, and that job's
    srun fails.
    """
    under_way = Run.of_copy(box, original, folder / "under-way", "dense")
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
        (under_way, "slurmctld away for 15 s in mid-run", struck),
        (to_come, "slurmctld away for 15 s at submission", struck),
    ]


def main() -> None:
    if reason := install():
        sys.exit(f"Slurm: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        box = Box(Path(folder, "box"))
        box.start()
        try:
            for o in all_faults(box, prepare(Path(folder, "original")), Path(folder)):
                same = "bit-identical" if o.same else "OTHER WEIGHTS"
                print(
                    f"| {o.fault} | {o.steps_lost} | {o.seconds_lost:.0f} | {same}; {o.n_jobs} job(s), "
                    f"{o.n_starts} start(s) |",
                    flush=True,
                )
        finally:
            box.stop()


if __name__ == "__main__":
    main()
