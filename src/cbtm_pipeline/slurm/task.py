"""On the compute node: run one module as a user would, inside a submitit job, and decide what its end means.

    exit 0      The outputs are kept under a second name, and result.json says so.
    exit 85     The module saved its state because of a signal. After USR2, Slurm's notice of the time limit,
    this job
                is requeued and goes on from there. After TERM, Slurm has decided already: it requeues the job
                (preemption) or does not (scancel).
    killed      (SIGKILL, a crash) The module starts again in this job, from its last saved state.
    otherwise   The module failed, and result.json says so.

Where several tasks train one expert, a task that is killed or fails ends the job, and the launcher submits
the next.

Two checks stop a job that would go on for ever: GPUs other than those asked for, and MAX_TRIES starts without
a new saved step.

submitit carries this object to the node in a pickle. Who can write to its folder can put another one there.
So the launcher refuses folders to which everybody may write (`base/trust`). Nothing else here reads a pickle.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit

from cbtm_pipeline.base.cli import EXIT_SAVED
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.slurm import commands, events

REQUEUE_TRIES = 12
# Exit statuses of a module that a signal stopped: it saved its state, or it had no handler yet.
STOPPED = {EXIT_SAVED, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2}


class Task:
    """One module's command line and how it is run. `order` is plain data, see launch.py."""

    def __init__(self, order: dict[str, Any]):
        self.order = order

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts after a requeue: this task again, as its state is in files."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Run the module; while it is killed, run it again. Exits with a status for Slurm."""
        job, order = submitit.JobEnvironment(), self.order
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler: checkpoint(), scontrol requeue, exit
        assert callable(requeue)
        if job.num_tasks > 1:
            torch_environment = submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
            os.environ["MASTER_ADDR"] = address(torch_environment.master_addr)
        first = job.global_rank == 0
        work = Path(order["work"]) if order["work"] else None
        received: list[int] = []
        while True:
            if first:
                self._start(events.saved_step(work), job.num_tasks)
            status = run(order["command"], received)
            if first:
                self._event("ended", status=status, signals=received, step=events.saved_step(work))
            if not self._goes_on(status, received, first, job.num_tasks, requeue):
                return

    def _start(self, step: int | None, n_tasks: int) -> None:
        """Record the start. If this job would go on for ever, write the reason as its result and exit."""
        fault = wrong_gpus(self.order["gpus"]) or self._stalled(step)
        self._event("started", step=step, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), n_tasks=n_tasks)
        if fault:
            self._finish(1, fault)
            sys.exit(1)  # with this status, srun ends the other ranks

    def _goes_on(
        self, status: int, received: list[int], first: bool, n_tasks: int, requeue: Callable[[int, None], Any]
    ) -> bool:
        """Whether the module was killed and starts again. After any other end, exits with a status."""
        if status in STOPPED and (received or n_tasks > 1):  # a signal to one of several tasks stops all
            if not first:
                return False  # rank 0 decides: an exit status here would make srun kill it meanwhile
            if signal.SIGUSR2 in received and signal.SIGTERM not in received:
                self._requeue(requeue)
            sys.exit(EXIT_SAVED)
        if first and status and self._superseded():
            # Slurm took this node for lost and started the job on another one, which decides
            sys.exit(status)
        if n_tasks > 1 and status:
            # srun ends the other ranks, and a new job tries again: which rank failed is unknown here
            sys.exit(1)
        if status >= 0:
            if first:
                self._finish(status, None)
            sys.exit(status)
        return True

    def _requeue(self, requeue: Callable[[int, None], Any]) -> None:
        for _ in range(REQUEUE_TRIES):  # the controller may be away just now
            try:
                requeue(signal.SIGUSR2, None)
            except subprocess.SubprocessError as error:
                self._event("requeue failed", error=str(error))
                time.sleep(5)

    def _stalled(self, step: int | None) -> str | None:
        """The error if MAX_TRIES starts brought no new saved step, else None."""
        rows = events.of_this_work(events.read(Path(self.order["folder"])), self.order["fingerprint"])
        n = events.n_tries(rows, "started", step)
        if n < events.MAX_TRIES:
            return None
        at = "" if step is None else f" at step {step}"
        return (
            f"{self.order['name']}: started {n} times{at} without a new saved step. "
            "Expected one between two starts. "
            "Raise runtime in the profile or lower run.checkpoint_seconds, then start again."
        )

    def _superseded(self) -> bool:
        """Whether Slurm has started this job again on another node."""
        rows = events.read(Path(self.order["folder"]))
        newest = [row for row in rows if row["event"] == "started"][-1]
        return not incarnation().items() <= newest.items()

    def _event(self, event: str, **values: Any) -> None:
        names = {"fingerprint": self.order["fingerprint"], "node": os.environ.get("SLURMD_NODENAME")}
        events.add(Path(self.order["folder"]), event, **incarnation(), **names, **values)

    def _finish(self, status: int, error: str | None) -> None:
        folder = Path(self.order["folder"])
        if status == 0:
            keep(self.order["outputs"], folder / "kept")
        result = {"token": self.order["token"], "status": status, "error": error}
        events.write_json(folder / "result.json", result)


def incarnation() -> dict[str, Any]:
    """The id of this job, and how often Slurm has restarted it."""
    return {"job_id": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def run(command: list[str], received: list[int]) -> int:
    """Run the module to its end. Returns its exit status, or minus the number of the signal that killed it.

    Signals are appended to `received` and passed on: under cgroups, Slurm signals this process only.
    """
    child: subprocess.Popen | None = None

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if child:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    child = subprocess.Popen(command)
    for number in received:
        child.send_signal(number)
    return child.wait()


def address(node: str) -> str:
    """The name of a node; if the name cannot be resolved, the address that Slurm uses for it."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", commands.ask("scontrol", "show", "node", node, "--oneliner"))
        return found[1] if found else node


def wrong_gpus(expected: int) -> str | None:
    """The error if this process does not see as many GPUs as were asked for, else None."""
    if not expected:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        printed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        lines = [line for line in printed.splitlines() if line.startswith("GPU ")]
        visible = ",".join(line.split(":")[0].removeprefix("GPU ") for line in lines)
    found = [index for index in (visible or "").split(",") if index]
    if len(found) == expected:
        return None
    return (
        f"CUDA_VISIBLE_DEVICES: {visible!r} on {os.environ.get('SLURMD_NODENAME')}. "
        f"Expected {expected} GPUs, as asked for. "
        "Set gpus and gpu_model in the profile to what the partition has, or ask its operators."
    )


def keep(outputs: list[str], folder: Path) -> None:
    """Give each output a second name in `folder`.

    Snakemake, killed and started again, deletes the first name before the launcher looks for the result.
    """
    fresh(folder)
    for index, output in enumerate(outputs):
        try:
            os.link(output, folder / str(index))
        except OSError:  # no hard links on this file system: then the work is done again
            continue
