"""Find the state of each stage and expert of a run from its files and from Slurm's queue.

`cbtm status` shows it.
"""

import itertools
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.publish import is_alive
from cbtm_pipeline.ops import lenient
from cbtm_pipeline.ops.status_table import Row, State
from cbtm_pipeline.slurm import commands

STALE_S = 180.0  # a training whose lock and log have not changed for so long is not running
LOG_TAIL = 1 << 14  # bytes at the end of a log that are read: about eighty steps
EVENTS_TAIL = 1 << 18  # the same for a job's history: about a thousand events
ON_NODE = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED"}

Event = dict[str, Any]


class Snapshot(NamedTuple):
    """A run at the unix time `now`.

    `queue` is Slurm's, jobs by id; None if Slurm cannot be asked. `began`: when the run was last started;
    earlier failures do not count. `active`: a process holds the run's folder.
    """

    outdir: Path
    queue: Mapping[str, commands.QueuedJob] | None
    now: float
    began: float
    active: bool


class Evidence(NamedTuple):
    """What the files of a stage or an expert say. `name` is that of its Slurm job."""

    name: str
    log: Path
    done: bool  # its output is there
    live: bool  # its files show a process at work
    begun: bool  # it has left a trace


def judge(run: Snapshot, row: Row, found: Evidence) -> Row:
    """The row with its state, its error and what is known of its Slurm job."""
    folder = run.outdir / "slurm" / found.name
    record = lenient.json_object(folder / "job.json")
    events = _newest_work(lenient.rows(folder / "events.jsonl", EVENTS_TAIL))
    of_jobs = [event for event in events if event.get("job_id") is not None]
    newest_id = record.get("job_id") if record else of_jobs[-1]["job_id"] if of_jobs else None
    job_id = lenient.text(newest_id)
    job = (run.queue or {}).get(job_id or "")
    n_started = sum(event["event"] == "started" for event in events)
    error = None if found.done else _failure(run, folder, record, events, found.log)
    in_doubt = bool(record.get("job_id")) and run.queue is None
    state = _state(found, error, job, in_doubt, bool(n_started))
    of_job = [event for event in of_jobs if lenient.text(event["job_id"]) == job_id]
    nodes = [event["node"] for event in of_job if event.get("node") is not None]
    last_node = nodes[-1] if nodes and state != "waiting" else None
    return row._replace(
        state=state,
        job=job_id,
        job_state=job and lenient.text(job.state),
        reason=lenient.text(job.reason) if job and job.reason not in ("", "None") else None,
        node=lenient.text(job.nodes if job and job.nodes else last_node),
        n_restarts=n_started - 1 if n_started else None,
        error=error,
    )


def _state(
    found: Evidence, error: str | None, job: commands.QueuedJob | None, in_doubt: bool, has_started: bool
) -> State:
    """The state by the strongest evidence. `in_doubt`: there is a Slurm job, and Slurm cannot be asked."""
    if found.done:
        return "done"
    if error:
        return "failed"
    if job and job.state in commands.LIVE:
        return "running" if job.state in ON_NODE else "waiting"
    if found.live:
        return "running"
    if in_doubt:
        return "unknown"
    return "stopped" if found.begun or has_started else "waiting"


def _newest_work(events: Sequence[Event]) -> list[Event]:
    """The events of a job's newest piece of work: not of other work, nor of work that was done before."""
    events = [event for event in events if "event" in event]
    ends = [event["event"] == "taken" and event.get("status") == 0 for event in events[:-1]]
    done = [i for i, is_end in enumerate(ends) if is_end]
    events = events[done[-1] + 1 if done else 0 :]
    return [event for event in events if event.get("fingerprint") == events[-1].get("fingerprint")]


def _failure(
    run: Snapshot, folder: Path, record: dict[str, Any], events: Sequence[Event], log: Path
) -> str | None:
    """Why a job failed, by the last line of its log, its result or its newest event; None if it did not."""
    is_new = (lenient.changed(log) or -1.0) >= run.began
    lines = lenient.end(log, LOG_TAIL).splitlines() if is_new else []
    logged = cli.LINE.fullmatch(lines[-1].decode(errors="replace")) if lines else None
    if logged and logged[1] == "E":
        return lenient.text(logged[2])
    newest = events[-1] if events else {}
    result = lenient.json_object(folder / "result.json")
    failed = bool(record and result.get("token") == record.get("token") and result.get("status"))
    if newest.get("event") in ("ended", "taken") and (lenient.number(newest.get("time")) or 0.0) >= run.began:
        status = lenient.number(newest.get("status")) or 0.0
        failed = failed or (status > 0 and status != cli.EXIT_SAVED)
    if not failed:
        return None
    logs = [path for path in lenient.listed(folder) if path.name.endswith("_log.out")]
    outputs = [(lenient.changed(path) or 0.0, path) for path in logs]
    where = f"see {max(outputs)[1]}" if outputs else "see what snakemake printed"
    return lenient.text(result.get("error") or newest.get("error")) or f"its job ended with an error, {where}"


def eta(n_steps_left: float, times: Sequence[float], now: float) -> float | None:
    """Seconds to the last step. `times`: when the newest steps ended. None if their duration is not known.

    The median time of a step is robust to a restart or a save between two steps. Rows come late, so the age
    of the newest one counts as work, unless it is from before a restart.
    """
    step = lenient.median([after - before for before, after in itertools.pairwise(times)])
    if step is None:
        return None
    age = now - times[-1] if 0 < now - times[-1] < STALE_S else 0.0
    return lenient.number(max(0.0, n_steps_left * step - age))


def is_live(lock: Path, newest_row: float | None, now: float) -> bool:
    """Whether a process is at work, by its lock file or by the time of the newest row of its log.

    A process renews the record in its lock every few seconds, and empties it at its end. One that is killed
    leaves it.
    """
    changed = lenient.changed(lock)
    if changed is not None and not lenient.end(lock, LOG_TAIL).strip():
        return False
    if _is_dead(lenient.json_object(lock)):
        return False
    return now - max(changed or 0.0, newest_row or 0.0) < STALE_S


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock's record was one of this host, and is gone."""
    pid = record.get("pid")
    if record.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    return not is_alive(pid)


def holder(lock: Path, now: float) -> str | None:
    """The live process that holds this lock; None if there is none."""
    record = lenient.json_object(lock)
    if not record or not is_live(lock, None, now):
        return None
    return f"process {lenient.text(record.get('pid'))} on {lenient.text(record.get('host'))}"


def traces(outdir: Path) -> list[str]:
    """Ids of the experts that have left files, in order: for a run whose config cannot be read."""
    names = {path.name for folder in ("experts", "work") for path in lenient.listed(outdir / folder)}
    names |= {path.name.removeprefix("expert-") for path in lenient.listed(outdir / "slurm")}
    numbered, dense = r"(?:parent|first)-(\d{1,9})|(\d{1,9})", r"(dense(?:-batch|-steps|-large)?)"
    expert = re.compile(rf"(seed)|{numbered}|{dense}|random-(\d{{1,9}})")
    ids = [found for name in names if (found := expert.fullmatch(name))]
    ids.sort(key=lambda found: (found.lastindex, int(found[2] or found[3] or found[5] or 0), found[0]))
    return [found[0] for found in ids]
