"""How a launcher waits: until Slurm answers, until a job changes, and while its own parent lives.

Standard library only.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cbtm_pipeline.base.cli import NEWS, log
from cbtm_pipeline.slurm import commands

POLL_S = 1.0  # between two looks for a result
UNREACHABLE_S = 5.0  # between two questions to a Slurm that does not answer

T = TypeVar("T")


class Detached(Exception):
    """This process has to end and to leave its job alone."""


class Watch:
    """What a launcher sees of Slurm. `folder` holds all jobs; `parent` started this process."""

    def __init__(self, folder: Path, parent: int):
        self.folder, self.parent, self.last_line = folder, parent, ""

    def say(self, line: str, is_news: bool = False) -> None:
        """Log a line unless it is the one before. With `is_news`, a brief terminal shows it."""
        if line != self.last_line:
            log.info(line, extra=NEWS if is_news else None)
            self.last_line = line

    def sleep(self, seconds: float = POLL_S) -> None:
        """Sleep. Raises Detached when the process that started this one has ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if os.getppid() != self.parent:
                raise Detached("the process that started this one is gone")
            time.sleep(min(left, POLL_S))

    def wait_for(self, ask: Callable[[], T]) -> T:
        """The answer of `ask`, called again and again while it raises Unreachable."""
        while True:
            try:
                return ask()
            except commands.Unreachable as error:
                self.no_answer(error)

    def no_answer(self, error: commands.Unreachable) -> None:
        """Say that Slurm does not answer, and wait a while."""
        self.say(f"Slurm does not answer ({error}), waiting")
        self.sleep(UNREACHABLE_S)

    def find(self, token: str) -> str | None:
        """The id of the job with this comment; None if there is none. Raises Unreachable."""
        jobs = commands.shared_queue(self.folder, time.time())
        return next((job.id for job in jobs.values() if job.comment == token), None)

    def look(self, job_id: str, newer_than: float) -> commands.QueuedJob | None:
        """The job in the queue, younger than the unix time `newer_than`; None if Slurm has forgotten it.

        Says where the job is. Raises Unreachable.
        """
        job = commands.shared_queue(self.folder, newer_than).get(job_id)
        if job:
            reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
            where = f" on {job.nodes}" if job.nodes else reason
            again = f", restarted {job.restarts} times" if job.restarts else ""
            self.say(f"job {job.id} {job.state.lower()}{where}{again}", is_news=job.state == "RUNNING")
        return job
