"""On the compute node: run one module as the user would, inside a submitit job, and decide what its end means.

    exit 0      its outputs are kept under a second name, result.json says so
    exit 85     it saved its state because of a signal. After USR2, Slurm's notice of the time limit: requeue this job, which goes on from
                there. After TERM Slurm has decided already: it requeues (preemption) or does not (scancel).
    killed      (SIGKILL, a crash) start it again in place, from its last saved state
    otherwise   it failed, result.json says so

Where several tasks train one expert, a task that is killed or fails ends the job, and the launcher submits the next.

Two things stop what would go on for ever: GPUs other than those asked for, and MAX_TRIES starts that brought no new step.

submitit carries this object to the node in a pickle of its own, written and read by the same user; nothing else here reads one.
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
from cbtm_pipeline.slurm import commands, events

REQUEUE_TRIES = 12
STOPPED = {
    EXIT_SAVED,
    -signal.SIGTERM,
    -signal.SIGUSR1,
    -signal.SIGUSR2,
}  # or it was not yet far enough to have a handler


class Task:
    """One module's command line and what surrounds it. `order` is plain data, see launch.py."""

    def __init__(self, order: dict[str, Any]):
        self.order = order

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit starts after the requeue: the same again, the state is in files."""
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        job, order = submitit.JobEnvironment(), self.order
        folder = Path(order["folder"])
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's own: checkpoint(), scontrol requeue, leave
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
            step = events.saved_step(work)
            if first:
                wrong = wrong_gpus(order["gpus"]) or self._stalled(folder, step)
                self._event(
                    "started", step=step, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), n_tasks=job.num_tasks
                )
                if wrong:
                    self._finish(1, wrong)
                    sys.exit(1)  # with it srun ends the other ranks
            status = run(order["command"], received)
            if first:
                self._event("ended", status=status, signals=received, step=events.saved_step(work))
            if status in STOPPED and (received or job.num_tasks > 1):  # one of several stops with the others
                if not first:
                    return  # rank 0 decides; an exit status would make srun kill it meanwhile
                if signal.SIGUSR2 in received and signal.SIGTERM not in received:
                    self._requeue(requeue)
                sys.exit(EXIT_SAVED)
            if first and status and self._superseded(folder):
                sys.exit(
                    status
                )  # Slurm took this node for lost and started the job elsewhere: that one has the say
            if job.num_tasks > 1 and status:
                sys.exit(
                    1
                )  # whose fault it was is not clear from here: srun ends the other ranks, and a new job tries again
            if status >= 0:
                if first:
                    self._finish(status, None)
                sys.exit(status)

    def _requeue(self, requeue: Callable[[int, None], Any]) -> None:
        for _ in range(REQUEUE_TRIES):  # the controller may be away just now
            try:
                requeue(signal.SIGUSR2, None)
            except subprocess.SubprocessError as error:
                self._event("requeue failed", error=str(error))
                time.sleep(5)

    def _stalled(self, folder: Path, step: int | None) -> str | None:
        rows = events.of_this_work(events.read(folder), self.order["fingerprint"])
        n = events.n_tries(rows, "started", step)
        if n < events.MAX_TRIES:
            return None
        at = "" if step is None else f" at step {step}"
        return (
            f"{self.order['name']}: started {n} times{at} without a new saved step. Expected one between two starts. "
            "Raise runtime in the profile or lower run.checkpoint_seconds, then start again."
        )

    def _superseded(self, folder: Path) -> bool:
        newest = [row for row in events.read(folder) if row["event"] == "started"][-1]
        return not incarnation().items() <= newest.items()

    def _event(self, event: str, **values: Any) -> None:
        about = {
            "fingerprint": self.order["fingerprint"],
            **incarnation(),
            "node": os.environ.get("SLURMD_NODENAME"),
        }
        events.add(Path(self.order["folder"]), event, **about, **values)

    def _finish(self, status: int, error: str | None) -> None:
        folder = Path(self.order["folder"])
        if status == 0:
            keep(self.order["outputs"], folder / "kept")
        events.write_json(
            folder / "result.json", {"token": self.order["token"], "status": status, "error": error}
        )


def incarnation() -> dict[str, Any]:
    """Which job this is, and after how many restarts."""
    return {"job_id": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def run(command: list[str], received: list[int]) -> int:
    """Run the module to its end and return its exit status, minus the signal's number where one killed it.

    Signals are appended to `received` and passed on: under cgroups Slurm signals this process only.
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
    """What other nodes can call a node: its name, or where the name means nothing outside Slurm, the address that Slurm uses."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", commands.ask("scontrol", "show", "node", node, "--oneliner"))
        return found[1] if found else node


def wrong_gpus(expected: int) -> str | None:
    """What is wrong with the GPUs that this process sees, None where they are as many as were asked for."""
    if not expected:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        visible = ",".join(
            line.split(":")[0].removeprefix("GPU ") for line in listed.splitlines() if line.startswith("GPU ")
        )
    found = [index for index in (visible or "").split(",") if index]
    if len(found) == expected:
        return None
    return (
        f"CUDA_VISIBLE_DEVICES: {visible!r} on {os.environ.get('SLURMD_NODENAME')}. Expected {expected} GPUs, as asked for. "
        "Set gpus and gpu_model in the profile to what the partition has, or ask its operators."
    )


def keep(outputs: list[str], folder: Path) -> None:
    """Give each output a second name: Snakemake, started again after it was killed, deletes the first before it asks for the result."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, output in enumerate(outputs):
        try:
            os.link(output, folder / str(index))
        except OSError:  # no hard links here: then the work is done again
            continue
