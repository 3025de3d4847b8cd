"""Questions to Slurm: the queue, the records of ended jobs; scancel and release. Standard library only.

A controller that does not answer raises `Unreachable`. That never means "no such job": whoever confuses the
two starts a second writer.
"""

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.publish import open_file
from cbtm_pipeline.slurm import events

TIMEOUT_S = 60  # of one command; a busy controller answers late
QUEUE_AGE_S = 10.0  # an answer of squeue is used for so long

# Slurm has no exit codes for this. A message that matches is temporary; users have to act on every other one.
_TEMPORARY = re.compile(
    r"unable to contact|could not connect|connection (refused|reset)|timed out|temporarily|try again"
    r"|zero bytes were transmitted|transport endpoint|communication|not responding|MaxSubmitJob|MaxSubmitPU"
    r"|controller is busy|munge|protocol authentication",
    re.I,
)


class Unreachable(OSError):
    """Slurm did not answer, or says that it cannot just now. Nothing follows from it for any job."""


class Refused(ValueError):
    """Slurm refused, and would refuse again."""


class QueuedJob(NamedTuple):
    """A line of squeue. `state` in capitals (PENDING, RUNNING, COMPLETING, COMPLETED, PREEMPTED ...)."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    restarts: int
    comment: str
    start: str
    end: str

    @property
    def is_held(self) -> bool:
        """Whether the job waits until somebody releases it."""
        return self.state in HELD and bool(_HELD.search(self.reason))

    @property
    def launch_failed(self) -> bool:
        """Whether Slurm itself holds the job, as a node failed to start it."""
        return self.is_held and bool(_LAUNCH_FAILED.search(self.reason))


# States of a job that has not ended.
LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
LIVE |= {"REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD"}
HELD = {"PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT"}  # states in which a job may be held
# Reasons of a job that nothing but a release starts (JobHeldUser, JobHeldAdmin, "job requeued in held state",
# JobHoldMaxRequeue, ...), and the one that Slurm gives when a node could not start a job.
_HELD = re.compile("held|hold", re.I)
_LAUNCH_FAILED = re.compile("launch.failed", re.I)
_FIELDS = ("JobID", "Name", "State", "Reason", "NodeList", "RestartCnt", "Comment", "StartTime", "EndTime")


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what a surrounding Slurm job set: it would change jobs submitted from there.

    Also without cli.BRIEF, as Slurm's own log of a job has all lines.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}
    left_out = ("SLURM_", "SBATCH_", "SRUN_", "PMI", cli.BRIEF)
    return {name: value for name, value in base.items() if name in kept or not name.startswith(left_out)}


def ask(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run a Slurm command and return its output. Raises Unreachable, or Refused with Slurm's message."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=environment(), check=False
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]}: no answer within {timeout_s:.0f} s") from None
    except FileNotFoundError:
        raise Refused(
            f"{command[0]}: not found. Expected Slurm's commands in PATH. Run where sbatch works."
        ) from None
    if run.returncode == 0:
        return run.stdout
    message = " ".join((run.stderr or run.stdout).split()) or f"exit status {run.returncode}"
    raise (Unreachable if is_temporary(message) else Refused)(f"{command[0]}: {message}")


def is_temporary(message: str) -> bool:
    """Whether Slurm's error goes away by itself (a restart, a busy controller, a full queue)."""
    return bool(_TEMPORARY.search(message))


def queue(timeout_s: float = TIMEOUT_S) -> dict[str, QueuedJob]:
    """This user's jobs by id, also those that ended in the last minutes (MinJobAge). One call of squeue."""
    fields = ",".join(f"{name}:|" for name in _FIELDS)
    printed = ask("squeue", "--me", "--states=all", "--noheader", f"--Format={fields}", timeout_s=timeout_s)
    jobs = {}
    for line in printed.splitlines():
        values = [value.strip() for value in line.split("|")]
        if len(values) == len(_FIELDS) + 1:
            id, name, state, reason, nodes, restarts, comment, start, end, _ = values
            comment = comment.removeprefix("(null)")
            jobs[id] = QueuedJob(id, name, state, reason, nodes, int(restarts or 0), comment, start, end)
    return jobs


def shared_queue(folder: Path, newer_than: float = 0.0) -> dict[str, QueuedJob]:
    """The queue, shared by all launchers that use `folder`: at most one squeue every QUEUE_AGE_S.

    The answer is younger than the unix time `newer_than`, so that a job just submitted is in it. Raises
    Unreachable as `queue` does.
    """
    path = folder / "queue.json"
    with os.fdopen(open_file(folder / ".queue.lock", os.O_WRONLY), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cached = _cached(path)
        if max(newer_than, time.time() - QUEUE_AGE_S) >= cached["asked"] or cached["asked"] > time.time():
            asked = time.time()
            try:
                cached = {"asked": asked, "jobs": list(queue().values()), "failed": None}
            except Unreachable as error:
                cached = {"asked": asked, "jobs": [], "failed": str(error)}
            events.write_json(path, cached)
    if cached["failed"]:
        raise Unreachable(cached["failed"])
    return {values[0]: QueuedJob(*values) for values in cached["jobs"]}


def _cached(path: Path) -> dict[str, Any]:
    """The answer in a file of `shared_queue`. Where there is no whole one: an old one, without jobs."""
    found = events.read_json(path) or {}
    jobs: Any = found.get("jobs")
    is_whole = isinstance(found.get("asked"), float) and isinstance(jobs, list) and "failed" in found
    if is_whole and all(isinstance(job, list) and len(job) == len(_FIELDS) for job in jobs):
        return found
    return {"asked": 0.0, "jobs": [], "failed": None}


def ended_as(job_id: str) -> str | None:
    """How a job ended that the queue has forgotten (`COMPLETED`, `CANCELLED`, ...), from the accounting.

    None if there is no record of it. Raises Unreachable.
    """
    try:
        printed = ask(
            "sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State"
        )
    except Refused:  # no accounting here
        return None
    states = printed.split("\n")[0].split()
    return states[0] if states else None


def cancel(job_id: str) -> None:
    """Call scancel. A job that is gone already is no error. Raises Unreachable."""
    try:
        ask("scancel", job_id)
    except Refused as error:
        if "Invalid job id" not in str(error):
            raise


def release(job_id: str) -> None:
    """Let a held job take its turn. Raises Unreachable, or Refused for one that an operator holds."""
    ask("scontrol", "release", job_id)
