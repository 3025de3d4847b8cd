"""One job from its submission until its result was taken, whatever is interrupted in between.

Standard library only: one such process waits on the login node for every job.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from cbtm_pipeline.base.cli import NEWS, log
from cbtm_pipeline.base.publish import open_file
from cbtm_pipeline.slurm import commands, events
from cbtm_pipeline.slurm.watch import Watch

LATENCY_S = 60.0  # a network file system may show a file this much later
# An end without a result counts when it has lasted for so many seconds. The end is the state of the job; any
# other state needs REQUEUE_S, as Slurm may still requeue the job.
CONFIRM_S = {"COMPLETED": LATENCY_S, "CANCELLED": 2.0}
REQUEUE_S = 15.0
AT_ONCE = 4  # submissions at the same time: hundreds of experts become ready in the same moment
MAX_RELEASES = 3  # of a job that one node after the other failed to start
TOKEN = re.compile("[0-9a-f]{32}")  # the comment of every launcher's job
SUBMIT_S = 3600.0  # give up when Slurm has accepted no job for so long
# Reasons for which a job would wait for ever.
FOREVER = {"PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "AccountNotAllowed"}
FOREVER |= {"QOSNotAllowed", "InvalidAccount", "InvalidQOS"}
HELPLESS = {  # ends that another job would only repeat
    "TIMEOUT": "reached its time limit. Expected to end within it. Raise its runtime in the profile",
    "OUT_OF_MEMORY": "was killed for its memory. Expected to need less. Raise its mem_mb in the profile",
    "DEADLINE": "was ended by its deadline. Expected none. Remove --deadline from slurm_extra",
    "CANCELLED": "was cancelled by somebody. Expected to run to its end. Start again to go on from its state",
}

JOB = {"token": str, "fingerprint": str, "submitted": float}  # what job.json holds beside the job's id

Order = dict[str, Any]
Record = dict[str, Any]


class Launcher:
    """One job. `folder` is its own, `order` is for task.py, `lock_fd` is open on the folder's lock file."""

    def __init__(self, folder: Path, order: Order, lock_fd: int, parent: int):
        self.folder, self.order, self.lock_fd = folder, order, lock_fd
        self.work = Path(order["work"]) if order["work"] else None
        self.watch = Watch(folder.parent, parent)
        self.seen_held: tuple[str, int, str] | None = None  # id, restarts and reason of a job

    def lock(self) -> None:
        """Wait until no other launcher has this job: one that has lost its parent leaves within POLL_S."""
        while True:
            try:
                return fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.watch.sleep()

    def run(self) -> None:
        """Return when the outputs are there. If they cannot be had, raise ValueError with the reason.

        Raises Detached when this process has to end and to leave the job alone.
        """
        record = self._previous()
        while True:
            record = record or self._submit()
            result, state = self._wait(record)
            if result:
                return self._take(result, record)
            job = f"job {record['job_id']}"
            if state in HELPLESS and not (state == "TIMEOUT" and self.work):
                self._fail(f"{job} {HELPLESS[state]}.")
            self._forget()
            step = self._from_step()
            line = f"{job} ended ({state.lower()}) before it was done, the next one goes on{step}"
            self.watch.say(line, is_news=True)
            record = None

    def cancel(self) -> None:
        """Cancel the submitted job, and remember that this launcher did it."""
        record = self._record()
        if record is None:
            return
        try:
            job_id = record["job_id"] or self.watch.find(record["token"])
            if job_id:
                commands.cancel(job_id)
                events.write_json(self.folder / "job.json", {**record, "job_id": job_id, "cancelled": True})
                self._add("cancelled", job_id=job_id)
                log.info("job %s cancelled", job_id, extra=NEWS)
        except OSError as error:
            job_id = record["job_id"]
            found = f"job {job_id}: not cancelled ({error})"
            log.error("%s. Expected an answer. Cancel it: scancel %s", found, job_id)

    def _record(self) -> Record | None:
        """The content of job.json; None if it is no record of a job, whoever has written it."""
        record = events.read_json(self.folder / "job.json")
        if record is None or not JOB.items() <= {name: type(value) for name, value in record.items()}.items():
            return None
        job_id = record.get("job_id", "")
        return record if job_id is None or re.fullmatch(r"\d+([_+]\d+)?", str(job_id)) else None

    def _previous(self) -> Record | None:
        """The job that an earlier launcher submitted, if it is still to be waited for.

        Cancels one of other work.
        """
        record = self._record()
        if record is None:
            return None
        if record["job_id"] is None:  # that launcher was killed while it submitted: has Slurm taken the job?
            record["job_id"] = self.watch.wait_for(lambda: self.watch.find(record["token"]))
            if record["job_id"] is None:
                return None
            events.write_json(self.folder / "job.json", record)
        same = record["fingerprint"] == self.order["fingerprint"]
        if same and not record.get("cancelled"):
            log.info("waiting again for job %s", record["job_id"], extra=NEWS)
            return record
        reason = "cancelled" if same else "of another config or other data"
        log.info("job %s is %s: waiting for its end", record["job_id"], reason, extra=NEWS)
        self.watch.wait_for(lambda: commands.cancel(record["job_id"]))
        while self.watch.wait_for(lambda: self._state(record)) in commands.LIVE:
            self.watch.sleep()
        self._forget()
        return None

    def _submit(self) -> Record:
        """Submit the job, patiently. Its token is on the disk first: a later launcher finds the job by it."""
        step = events.saved_step(self.work)
        rows = events.of_this_work(events.read(self.folder), self.order["fingerprint"])
        if events.n_tries(rows, "submitted", step) >= events.MAX_TRIES:
            self._fail(f"{events.MAX_TRIES} jobs in a row brought nothing new.")
        token = uuid.uuid4().hex
        order = {**self.order, "token": token, "sbatch": {**self.order["sbatch"], "comment": token}}
        names = {"name": order["name"], "token": token, "fingerprint": order["fingerprint"]}
        record: Record = {"job_id": None, **names, "submitted": time.time()}
        events.write_json(self.folder / "job.json", record)
        began, pause = time.monotonic(), 2.0
        while record["job_id"] is None:
            sbatch = self._call_submit(order)
            message = " ".join(sbatch.stderr.split())
            if sbatch.returncode == 0:
                record["job_id"] = sbatch.stdout.split()[-1]
            elif not commands.is_temporary(message) or time.monotonic() - began > SUBMIT_S:
                found = message or "sbatch failed"
                self._fail(f"{found}. Expected sbatch to take the job. Correct the profile.")
            else:
                self.watch.say(f"Slurm takes no job now ({message}), trying again", is_news=True)
                self.watch.sleep(pause)
                pause = min(2 * pause, 60.0)
                # Slurm may have taken the job, and its answer was lost.
                with contextlib.suppress(commands.Unreachable):
                    record["job_id"] = self.watch.find(token)
        record["submitted"] = time.time()
        events.write_json(self.folder / "job.json", record)
        self._add("submitted", job_id=record["job_id"], step=step)
        self.watch.say(f"job {record['job_id']} submitted{self._from_step()}", is_news=True)
        return record

    def _call_submit(self, order: Order) -> subprocess.CompletedProcess[str]:
        """Run submit.py.

        It inherits our lock: if we are killed now, the next launcher waits until sbatch has ended.
        """
        command = [sys.executable, "-m", "cbtm_pipeline.slurm.submit"]
        turn = self.folder.parent / f".submit-{int(order['token'], 16) % AT_ONCE}.lock"
        with os.fdopen(open_file(turn, os.O_WRONLY), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return subprocess.run(
                command,
                input=json.dumps(order),
                capture_output=True,
                text=True,
                pass_fds=[self.lock_fd],
                env=commands.environment(),
                check=False,
            )

    def _wait(self, record: Record) -> tuple[dict[str, Any] | None, str]:
        """The job's result; or None and the state in which the job ended without one."""
        looked = ended = 0.0  # when we last asked Slurm, and when we first saw that the job had ended
        while True:
            result = events.read_json(self.folder / "result.json")
            if result and result.get("token") == record["token"] and {"status", "error"} <= result.keys():
                return result, "COMPLETED"
            now = time.monotonic()
            if now - looked >= commands.QUEUE_AGE_S or ended:
                looked = now
                try:
                    state = self._state(record)
                except commands.Unreachable as error:
                    self.watch.no_answer(error)
                    continue
                if state in commands.LIVE:
                    ended = 0.0
                elif not ended:
                    ended = now
                elif now - ended > CONFIRM_S.get(state, REQUEUE_S):
                    return None, state
            self.watch.sleep()

    def _state(self, record: Record) -> str:
        """Slurm's state of the job. Raises Unreachable.

        Releases a job that Slurm holds. Cancels a job that would wait for ever, and raises ValueError.
        """
        job = self.watch.look(record["job_id"], record["submitted"])
        if job is None:
            return commands.ended_as(record["job_id"]) or "UNKNOWN"
        if job.comment != record["token"] and TOKEN.fullmatch(job.comment):
            # A controller that was killed forgets its last seconds, and gives the same ids to other jobs.
            return "UNKNOWN"
        if job.state == "PENDING" and job.reason in FOREVER:
            commands.cancel(job.id)
            found = f"job {job.id} would wait for ever ({job.reason})"
            self._fail(f"{found}. Expected what the partition grants. Correct the profile.")
        if job.is_held:
            self._held(job)
        return job.state

    def _held(self, job: commands.QueuedJob) -> None:
        """Release a job that a node failed to start. Of any other held job, say what to do. Once each.

        Raises Unreachable.
        """
        hold = (job.id, job.restarts, job.reason)
        if hold == self.seen_held:
            return
        found = job.reason
        if job.launch_failed and self._n_releases(job.id) < MAX_RELEASES:
            try:
                commands.release(job.id)
            except commands.Refused as error:
                found = f"{job.reason}; {error}"
            else:
                self._add("released", job_id=job.id, reason=job.reason, restart=job.restarts)
                log.info("job %s released: a node failed to start it (%s)", job.id, job.reason, extra=NEWS)
                found = ""
        self.seen_held = hold
        if found:
            todo = f"Release it with scontrol release {job.id}, or cancel it"
            log.warning("job %s: held (%s). Expected a job that waits for its turn. %s.", job.id, found, todo)

    def _n_releases(self, job_id: str) -> int:
        """How often the job was released since it last started."""
        rows = [row for row in events.read(self.folder) if row.get("job_id") == job_id]
        started = [i for i, row in enumerate(rows) if row["event"] == "started"]
        newest = rows[started[-1] + 1 if started else 0 :]
        return sum(row["event"] == "released" for row in newest)

    def _take(self, result: dict[str, Any], record: Record) -> None:
        """Return when all outputs are there. Raises ValueError if the job failed or an output is missing."""
        if result["status"]:
            found = f"job {record['job_id']} ended with exit status {result['status']}."
            self._fail(result["error"] or found)
        until = time.monotonic() + LATENCY_S
        for index, output in enumerate(map(Path, self.order["outputs"])):
            # Snakemake, killed and started again, deletes outputs that appeared meanwhile: the job kept a
            # link.
            if not output.exists():
                with contextlib.suppress(OSError):
                    os.link(self.folder / "kept" / str(index), output)
            while not output.exists():
                if time.monotonic() > until:
                    self._fail(f"{output}: missing. Expected the job to have made it. Start again.")
                self.watch.sleep()
        self._forget()
        self._add("taken", job_id=record["job_id"], status=0)
        log.info("job %s done", record["job_id"])

    def _forget(self) -> None:
        """Remove all files of the job but its log and its history."""
        (self.folder / "job.json").unlink(missing_ok=True)  # first: the others mean nothing without it
        (self.folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "kept", ignore_errors=True)
        for pattern in ("*.pkl", "*.sh", ".submission_file_*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _fail(self, reason: str) -> NoReturn:
        self._forget()
        self._add("taken", status=1, error=reason)
        logs = sorted(self.folder.glob("*_log.out"), key=lambda path: path.stat().st_mtime)
        raise ValueError(f"{self.order['name']}: {reason}{f' Its output: {logs[-1]}' if logs else ''}")

    def _add(self, event: str, **values: Any) -> None:
        events.add(self.folder, event, fingerprint=self.order["fingerprint"], **values)

    def _from_step(self) -> str:
        step = events.saved_step(self.work)
        return "" if step is None else f" from step {step}"
