"""The thread that computes: a bounded queue, and generations that take turns, one forward pass each."""

import asyncio
import math
import statistics
import threading
import time
from collections import deque
from typing import Any

from cbtm_pipeline.base.cli import log
from cbtm_pipeline.inference.answer import Piece, Tally, answer
from cbtm_pipeline.inference.loaded import Ensemble
from cbtm_pipeline.inference.metrics import Metrics
from cbtm_pipeline.inference.refusal import Refused
from cbtm_pipeline.inference.requests import Limits, Task

LONGEST_RETRY_S = 60


class Job:
    """A task on its way. `events` gets lists of pieces, then None or the Refused that ended it."""

    def __init__(self, task: Task, loop: asyncio.AbstractEventLoop):
        self.task, self.loop, self.tally = task, loop, Tally()
        self.events: asyncio.Queue[list[Piece] | Refused | None] = asyncio.Queue()
        self.came = time.monotonic()
        self.began = self.first_token = 0.0
        self.is_cancelled = False
        self.steps: Any = None

    def cancel(self) -> None:
        """Nobody reads any more: compute no further."""
        self.is_cancelled = True

    def put(self, event: list[Piece] | Refused | None) -> None:
        """Hand over to the server's thread. Nothing happens if that has ended."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.cancel()


class Worker(threading.Thread):
    """Computes the tasks. One thread uses the model, so nothing in it needs a lock."""

    def __init__(self, ensemble: Ensemble, limits: Limits, metrics: Metrics):
        super().__init__(name="worker", daemon=True)
        self.ensemble, self.limits, self.metrics = ensemble, limits, metrics
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.is_closing = self.is_hurried = False
        self.recent: deque[float] = deque([1.0], maxlen=20)  # seconds that jobs took
        metrics.watch(lambda: len(self.waiting), lambda: len(self.running))

    def submit(self, task: Task) -> Job:
        """Queue a task, from the server's thread. Raises Refused: 429 for a full queue, 503 at the end."""
        job = Job(task, asyncio.get_running_loop())
        with self.changed:
            if self.is_closing:
                raise _closing()
            free = self.limits.concurrency - len(self.running)
            if len(self.waiting) >= self.limits.n_waiting + max(free, 0):
                found = f"queue: {len(self.waiting)} requests wait"
                expected = f"Expected at most {self.limits.n_waiting}"
                raise Refused(
                    429, f"{found}. {expected}. Try again later.", None, "queue_full", self.retry_after_s()
                )
            self.waiting.append(job)
            self.changed.notify()
        return job

    def retry_after_s(self) -> int:
        """Seconds until a place is likely to be free: as long as one job takes, and one at least."""
        return min(max(math.ceil(statistics.mean(self.recent)), 1), LONGEST_RETRY_S)

    def close(self, hurry: bool = False) -> None:
        """Finish what runs, refuse what waits. `hurry`: stop what runs after its next token."""
        with self.changed:
            self.is_closing, self.is_hurried = True, self.is_hurried or hurry
            self.changed.notify()

    def run(self) -> None:
        """Give each running job its turn, until `close`."""
        while True:
            with self.changed:
                self._admit()
                while not self.running:
                    if self.is_closing:
                        return
                    self.changed.wait()
                    self._admit()
                running = list(self.running)
            for job in running:
                if not self._step(job):
                    with self.changed:
                        self.running.remove(job)

    def _admit(self) -> None:
        """Take jobs from the queue; drop those that wait too long, or for nobody."""
        now, waiting = time.monotonic(), list(self.waiting)
        self.waiting.clear()
        for job in waiting:
            if job.is_cancelled:
                self._count(job, "hangup")
            elif self.is_closing:
                self._end(job, "refused", _closing())
            elif now - job.came > self.limits.timeout_s:
                found = f"queue: no turn within {self.limits.timeout_s:g} s"
                refusal = Refused(
                    503,
                    f"{found}. Expected a shorter queue. Try again later.",
                    None,
                    "timeout",
                    self.retry_after_s(),
                )
                self._end(job, "refused", refusal)
            elif len(self.running) < self.limits.concurrency:
                job.began = now
                job.steps = answer(self.ensemble, job.task, job.tally, lambda job=job: self._is_over(job))
                self.running.append(job)
            else:
                self.waiting.append(job)

    def _is_over(self, job: Job) -> bool:
        return self.is_hurried or time.monotonic() - job.began > self.limits.timeout_s

    def _step(self, job: Job) -> bool:
        """One turn of a job. Returns whether it goes on."""
        if job.is_cancelled:
            job.steps.close()
            self._count(job, "hangup")
            return False
        try:
            pieces = next(job.steps)
        except StopIteration:
            self._end(job, "done", None)
            return False
        except Refused as refusal:
            self._end(job, "timeout", refusal)
            return False
        except Exception as error:  # one request must not end the server
            log.exception("a generation failed")
            found = f"server: {type(error).__name__} while computing"
            refusal = Refused(500, f"{found}. Expected an answer. See the server's log.")
            self._end(job, "error", refusal)
            return False
        if job.tally.n_generated and not job.first_token:
            job.first_token = time.monotonic()
        if pieces:
            job.put(pieces)
        return True

    def _end(self, job: Job, how: str, event: Refused | None) -> None:
        if how == "done" and self._is_over(job):
            how = "timeout"
        self._count(job, how)
        job.put(event)

    def _count(self, job: Job, how: str) -> None:
        now = time.monotonic()
        if job.began:
            self.recent.append(now - job.began)
        wait = job.first_token - job.came if job.first_token else None
        self.metrics.finished(how, job.tally, wait, now - job.first_token if job.first_token else 0.0)


def _closing() -> Refused:
    return Refused(503, "server: shuts down. Expected to find it running. Try again later.", None, None, 5)
