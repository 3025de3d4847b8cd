"""Run one rule's module as a Slurm job and wait for it, however often the job, Slurm or this process is interrupted on the way.

    python -m cbtm_pipeline.slurm.launch --name expert-3 --folder results/slurm --resources '{"slurm_partition": "gpu", ...}' --threads 8 \\
        --made-from 4f1c... --outputs results/experts/3/model.safetensors --work results/work/3 \\
        -- python -m cbtm_pipeline.train_expert --config results/config.json --expert 3 ...

The folder results/slurm/expert-3 remembers the job from before its submission until its result was taken. Started again, this process finds
it there and waits for the same job, or takes the result that it left meanwhile; it submits anew only what Slurm says is gone. Ctrl-C
cancels the job; any other end of this process, or of the one that started it, leaves it alone.

A job that ends without a result (preempted and not requeued, node lost, time limit) is submitted again where that can help, at most
events.MAX_TRIES times without a new saved step. Standard library only: one such process waits on the login node for every job.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NoReturn

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.slurm import commands, events, request

POLL_S = 1.0  # between two looks for the result
LATENCY_S = 60.0  # a network file system may show a file this much later
CONFIRM_S = {
    "COMPLETED": LATENCY_S,
    "CANCELLED": 2.0,
}  # an end without a result counts when it has lasted this long ...
REQUEUE_S = 15.0  # ... or this long: Slurm may still requeue
AT_ONCE = 4  # submissions under way together: hundreds of experts become ready in the same moment
SUBMIT_S = 3600.0  # give up when Slurm has accepted nothing for so long
FOREVER = {
    "PartitionTimeLimit",
    "PartitionNodeLimit",
    "BadConstraints",
    "AccountNotAllowed",
    "QOSNotAllowed",
    "InvalidAccount",
    "InvalidQOS",
}
HELPLESS = {  # ends that would only come again
    "TIMEOUT": "reached its time limit. Expected to end within it. Raise runtime for this rule in the profile",
    "OUT_OF_MEMORY": "was killed for its memory. Expected to need less. Raise mem_mb for this rule in the profile",
    "DEADLINE": "was ended by its deadline. Expected none. Remove --deadline from slurm_extra",
    "CANCELLED": "was cancelled by somebody. Expected to run to its end. Start again to go on from its last saved state",
}

Order = dict[str, Any]
Record = dict[str, Any]


class Detached(Exception):
    """This process is to end and leave the job alone."""


class Launch:
    """One job, from its submission until its result was taken. `folder` is the job's own, `order` what task.py needs."""

    def __init__(self, folder: Path, order: Order, lock_fd: int, parent: int):
        self.folder, self.order, self.lock_fd, self.parent = folder, order, lock_fd, parent
        self.work = Path(order["work"]) if order["work"] else None
        self.said = ""

    def alone(self) -> None:
        """Wait until no other process waits for this job; one that has lost its parent leaves within POLL_S."""
        while True:
            try:
                return fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._sleep()

    def run(self) -> None:
        """Return when the outputs are there. Raises ValueError that says why they are not, Detached, KeyboardInterrupt."""
        record = self._previous()
        while True:
            record = record or self._submit()
            result, state = self._wait(record)
            if result:
                return self._take(result, record)
            if state in HELPLESS and not (state == "TIMEOUT" and self.work):
                self._fail(f"job {record['job_id']} {HELPLESS[state]}.")
            self._forget()
            self._say(
                f"job {record['job_id']} ended ({state.lower()}) before it was done, the next one goes on{self._from_step()}"
            )
            record = None

    def cancel(self) -> None:
        """scancel what was submitted, and remember that it was us."""
        record = events.read_json(self.folder / "job.json")
        if record is None:
            return
        try:
            job_id = record["job_id"] or self._find(record["token"])
            if job_id:
                commands.cancel(job_id)
                events.write_json(self.folder / "job.json", {**record, "job_id": job_id, "cancelled": True})
                events.add(self.folder, "cancelled", job_id=job_id, fingerprint=self.order["fingerprint"])
                log.info("job %s cancelled", job_id)
        except OSError as error:
            log.error(
                "job %s: not cancelled (%s). Expected an answer. Cancel it: scancel %s",
                record["job_id"],
                error,
                record["job_id"],
            )

    def _previous(self) -> Record | None:
        """The job of an earlier life of this process that is still to be waited for."""
        record = events.read_json(self.folder / "job.json")
        if record is None:
            return None
        if record["job_id"] is None:  # killed while submitting: did Slurm take it?
            record["job_id"] = self._patiently(lambda: self._find(record["token"]))
            if record["job_id"] is None:
                return None
            events.write_json(self.folder / "job.json", record)
        same = record["fingerprint"] == self.order["fingerprint"]
        if same and not record.get("cancelled"):
            log.info("waiting again for job %s", record["job_id"])
            return record
        log.info(
            "job %s is %s: waiting for its end",
            record["job_id"],
            "cancelled" if same else "of another config or other data",
        )
        self._patiently(lambda: commands.cancel(record["job_id"]))
        while self._patiently(lambda: self._state(record, record["submitted"])) in commands.LIVE:
            self._sleep()
        self._forget()
        return None

    def _submit(self) -> Record:
        step = events.saved_step(self.work)
        rows = events.of_this_work(events.read(self.folder), self.order["fingerprint"])
        if events.n_tries(rows, "submitted", step) >= events.MAX_TRIES:
            self._fail(f"{events.MAX_TRIES} jobs in a row brought nothing new.")
        token = uuid.uuid4().hex
        order = {**self.order, "token": token, "sbatch": {**self.order["sbatch"], "comment": token}}
        record: Record = {
            "job_id": None,
            "name": order["name"],
            "token": token,
            "fingerprint": order["fingerprint"],
            "submitted": time.time(),
        }
        events.write_json(self.folder / "job.json", record)
        began, pause = time.monotonic(), 2.0
        while record["job_id"] is None:
            sbatch = self._call_submit(order)
            said = " ".join(sbatch.stderr.split())
            if sbatch.returncode == 0:
                record["job_id"] = sbatch.stdout.split()[-1]
            elif not commands.passes(said) or time.monotonic() - began > SUBMIT_S:
                self._fail(f"{said or 'sbatch failed'}. Expected sbatch to take the job. Mend the profile.")
            else:
                self._say(f"Slurm takes no job now ({said}), trying again")
                self._sleep(pause)
                pause = min(2 * pause, 60.0)
                with contextlib.suppress(
                    commands.Unreachable
                ):  # an answer that was lost on the way back is no refusal
                    record["job_id"] = self._find(token)
        record["submitted"] = time.time()
        events.write_json(self.folder / "job.json", record)
        events.add(
            self.folder, "submitted", job_id=record["job_id"], fingerprint=order["fingerprint"], step=step
        )
        self._say(f"job {record['job_id']} submitted{self._from_step()}")
        return record

    def _call_submit(self, order: Order) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cbtm_pipeline.slurm.submit"]
        turn = self.folder.parent / f".submit-{int(order['token'], 16) % AT_ONCE}.lock"
        with turn.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # With our lock: should this process be killed now, the next one waits until sbatch has ended.
            fds = [self.lock_fd]
            return subprocess.run(
                command,
                input=json.dumps(order),
                capture_output=True,
                text=True,
                pass_fds=fds,
                env=commands.environment(),
                check=False,
            )

    def _wait(self, record: Record) -> tuple[dict[str, Any] | None, str]:
        """The job's result, or None and the state in which it ended without one."""
        looked = ended = 0.0
        while True:
            result = events.read_json(self.folder / "result.json")
            if result and result["token"] == record["token"]:
                return result, "COMPLETED"
            now = time.monotonic()
            if now - looked >= commands.QUEUE_AGE_S or ended:
                looked = now
                try:
                    state = self._state(record, record["submitted"])
                except commands.Unreachable as error:
                    self._say(f"Slurm does not answer ({error}), waiting")
                    self._sleep(5)
                    continue
                if state in commands.LIVE:
                    ended = 0.0
                elif not ended:
                    ended = now
                elif now - ended > CONFIRM_S.get(state, REQUEUE_S):
                    return None, state
            self._sleep()

    def _state(self, record: Record, newer_than: float) -> str:
        job = commands.shared_queue(self.folder.parent, newer_than).get(record["job_id"])
        if job is None:
            return commands.ended_as(record["job_id"]) or "UNKNOWN"
        if job.state == "PENDING" and job.reason in FOREVER:
            commands.cancel(job.id)
            self._fail(
                f"job {job.id} would wait for ever ({job.reason}). Expected what the partition grants. Mend the profile."
            )
        where = (
            f" on {job.nodes}" if job.nodes else f" ({job.reason})" if job.reason not in ("", "None") else ""
        )
        again = f", restarted {job.restarts} times" if job.restarts else ""
        self._say(f"job {job.id} {job.state.lower()}{where}{again}")
        return job.state

    def _take(self, result: dict[str, Any], record: Record) -> None:
        if result["status"]:
            self._fail(
                result["error"] or f"job {record['job_id']} ended with exit status {result['status']}."
            )
        until = time.monotonic() + LATENCY_S
        for index, output in enumerate(map(Path, self.order["outputs"])):
            # Snakemake, started again, has deleted what was published while it was dead.
            if not output.exists():
                with contextlib.suppress(OSError):
                    os.link(self.folder / "kept" / str(index), output)
            while not output.exists():
                if time.monotonic() > until:
                    self._fail(f"{output}: missing. Expected the job to have made it. Start again.")
                self._sleep()
        self._forget()
        events.add(
            self.folder, "taken", job_id=record["job_id"], fingerprint=self.order["fingerprint"], status=0
        )
        log.info("job %s done", record["job_id"])

    def _find(self, token: str) -> str | None:
        """The id of the job with this comment."""
        jobs = commands.shared_queue(self.folder.parent, time.time())
        return next((job.id for job in jobs.values() if job.comment == token), None)

    def _patiently(self, ask: Any) -> Any:
        while True:
            try:
                return ask()
            except commands.Unreachable as error:
                self._say(f"Slurm does not answer ({error}), waiting")
                self._sleep(5)

    def _forget(self) -> None:
        """The job is over: leave its log and its history only."""
        (self.folder / "job.json").unlink(missing_ok=True)  # first: what is left has no meaning without it
        (self.folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "kept", ignore_errors=True)
        for path in [
            *self.folder.glob("*.pkl"),
            *self.folder.glob("*.sh"),
            *self.folder.glob(".submission_file_*"),
        ]:
            path.unlink(missing_ok=True)

    def _fail(self, why: str) -> NoReturn:
        self._forget()
        events.add(self.folder, "taken", fingerprint=self.order["fingerprint"], status=1, error=why)
        logs = sorted(self.folder.glob("*_log.out"), key=lambda path: path.stat().st_mtime)
        raise ValueError(f"{self.order['name']}: {why}{f' Its output: {logs[-1]}' if logs else ''}")

    def _from_step(self) -> str:
        step = events.saved_step(self.work)
        return "" if step is None else f" from step {step}"

    def _say(self, line: str) -> None:
        if line != self.said:
            log.info(line)
            self.said = line

    def _sleep(self, seconds: float = POLL_S) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if os.getppid() != self.parent:
                raise Detached("whoever started this is gone")
            time.sleep(min(left, POLL_S))


def main() -> None:
    parent = os.getppid()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True, help="of the job")
    p.add_argument("--folder", required=True, type=Path, help="holds a folder for every job")
    p.add_argument(
        "--resources", required=True, type=json.loads, help="JSON object with the resources of the profile"
    )
    p.add_argument("--threads", type=int, default=1, help="CPUs of each task")
    p.add_argument(
        "--made-from",
        default="",
        help="identity of all that the work depends on; a job of other work is replaced",
    )
    p.add_argument("--outputs", nargs="*", default=[])
    p.add_argument(
        "--work",
        help="a training's folder with its resumable state: it goes on after a time limit, on one task per GPU",
    )
    p.add_argument("command", nargs="+", help="after --: the module to run")
    args = p.parse_args()
    cli.start_logging(args.name, None)

    folder = args.folder / args.name
    folder.mkdir(parents=True, exist_ok=True)
    sbatch = request.sbatch_parameters(args.name, args.resources, args.threads, "", args.work is not None)
    order = {
        "name": args.name,
        "folder": str(folder.resolve()),
        "command": args.command,
        "work": args.work,
        "outputs": args.outputs,
        "gpus": int(args.resources.get("gpus", 0)),
        "fingerprint": hashlib.blake2b(
            json.dumps([args.made_from, args.command]).encode(), digest_size=16
        ).hexdigest(),
        "sbatch": sbatch,
    }

    def detach(number: int, frame: object) -> NoReturn:
        raise Detached(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, detach)
    lock_fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    launch = Launch(folder, order, lock_fd, parent)
    try:
        launch.alone()
        launch.run()
    except Detached as why:
        log.info("left alone (%s): the job goes on, start again to wait for it", why)
        sys.exit(143)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        launch.cancel()
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main)
