"""What the terminal shows of a run: a line when a job starts, one when it is done, warnings and errors.

Snakemake's option --quiet cannot do this. It hides the errors of jobs and the jobs of a dry run, too, and it
takes the same lines from Snakemake's own log. So `be_brief` puts a handler of ours before Snakemake's handler
of the terminal. Nothing is lost: .snakemake/log has all that Snakemake says, <outdir>/logs all that jobs say.
"""

import logging
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from snakemake_interface_logger_plugins.common import LogEvent

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.base.printable import printable
from cbtm_pipeline.ops import lenient

HANDLER = "DefaultStreamHandler"  # Snakemake's name of its handler of the terminal
TARGET = "all"  # the rule that only names files
CLOCKS_S = 1.0  # the clock of a file system may be so much behind
WIDTH = 24  # of the names of jobs
LOG_TAIL = 1 << 24  # bytes of a job's log that are looked at
# Events that the terminal does not show, or shows as a line of ours.
BLOCKS = {LogEvent.WORKFLOW_STARTED, LogEvent.RESOURCES_INFO, LogEvent.RUN_INFO, LogEvent.JOB_STARTED}
BLOCKS |= {LogEvent.JOB_INFO, LogEvent.JOB_FINISHED, LogEvent.PROGRESS}
# Lines that begin like this are the same in every run. They have no event.
ROUTINE = ("Assuming unrestricted shared filesystem", "Building DAG of jobs", "Using shell: ")
ROUTINE += ("Select jobs to execute", "Conda environments: ignored")


class Job(NamedTuple):
    """A job that has started. `began` is a unix time."""

    label: str
    began: float
    log: Path | None
    on_slurm: bool


def be_brief(
    logger: logging.Logger, settings: Any, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let the terminal show little of the run, and tell the jobs of it. `settings`: workflow.output_settings.

    Does nothing in a dry run, with --verbose, and if a plugin (--logger) writes to the terminal.
    """
    environment.pop(cli.BRIEF, None)
    terminal = next((handler for handler in logger.handlers if handler.name == HANDLER), None)
    for handler in logger.handlers:
        handler.setFormatter(Printable(handler.formatter))
    if settings.dryrun or settings.verbose or not isinstance(terminal, logging.StreamHandler):
        return
    logger.removeHandler(terminal)
    logger.addHandler(Brief(terminal))
    environment[cli.BRIEF] = "1"


class Printable(logging.Formatter):
    """Another formatter's text, printable: names of files and errors of jobs may hold anything."""

    def __init__(self, inner: logging.Formatter | None):
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> Any:
        text = self.inner.format(record)
        return printable(text) if isinstance(text, str) else text  # Snakemake's gives None for no text


class Brief(logging.Handler):
    """Writes one line for each start and end of a job, and hands on warnings, errors and other news.

    `terminal` is Snakemake's handler. What its filter hides (--quiet) has no line here either.
    """

    def __init__(self, terminal: logging.StreamHandler):
        super().__init__()
        self.terminal = terminal
        self.jobs: dict[int, Job] = {}
        self.n_jobs = self.n_done = self.n_failed = 0

    def emit(self, record: logging.LogRecord) -> None:
        event, is_shown = getattr(record, "event", None), bool(self.terminal.filter(record))
        try:
            if event == LogEvent.RUN_INFO:
                self._plan(record, is_shown)
            elif event == LogEvent.JOB_INFO:
                self._start(record, is_shown)
            elif event == LogEvent.JOB_FINISHED:
                self._finish(record, is_shown)
            elif event not in BLOCKS and not str(record.msg).startswith(ROUTINE):
                self.terminal.handle(record)
            if event == LogEvent.JOB_ERROR:
                self._fail(record, is_shown)
        except Exception:  # as in every handler: a wrong line must not end the run
            self.handleError(record)

    def _plan(self, record: Any, is_shown: bool) -> None:
        """Say how many jobs there are, before the first one starts."""
        counts = {rule: n for rule, n in record.stats.items() if rule not in ("total", TARGET)}
        self.n_jobs = sum(counts.values())
        if is_shown:
            names = (f"{n} {rule}" if n > 1 else rule for rule, n in counts.items())
            self._say(record, "snakemake", f"jobs: {self.n_jobs} ({', '.join(names)})")

    def _start(self, record: Any, is_shown: bool) -> None:
        """Remember a job, and say that it starts. On Slurm, its launcher says so."""
        if record.rule_name == TARGET:
            return
        label = " ".join([record.rule_name, *map(str, record.wildcards.values())])
        on_slurm = bool(record.resources.get("slurm_partition"))
        job = Job(label, record.created, Path(record.log[0]) if record.log else None, on_slurm)
        self.jobs[record.jobid] = job
        if is_shown and not on_slurm:
            self._say(record, label, "started")

    def _finish(self, record: Any, is_shown: bool) -> None:
        """Say that a job is done, with the last line of its log: its result."""
        job = self.jobs.pop(record.job_id, None)
        if job is None:
            return
        self.n_done += 1
        found = logged(job)
        if job.on_slurm:  # the job itself has no way to the terminal
            self._write(*(line for level, _, line in found if level == "W"))
        if is_shown:
            results = [f": {message}" for level, message, _ in found if level == "I"]
            self._say(record, job.label, self._ended("done", record, job) + "".join(results[-1:]))

    def _fail(self, record: Any, is_shown: bool) -> None:
        """Say that a job has failed, after Snakemake's block with the reason."""
        job = self.jobs.pop(record.jobid, None)
        if job is None:
            return
        self.n_failed += 1
        if is_shown:
            self._say(record, job.label, self._ended("failed", record, job))

    def _ended(self, how: str, record: logging.LogRecord, job: Job) -> str:
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        progress = f"{self.n_done} of {self.n_jobs} jobs done{failed}"
        return f"{how} in {duration(record.created - job.began)} ({progress})"

    def _say(self, record: logging.LogRecord, label: str, text: str) -> None:
        """Write a line like those of the jobs."""
        line = logging.makeLogRecord({**record.__dict__, "msg": text, "args": None})
        self._write(cli.formatter(f"{label:<{WIDTH}}").format(line))

    def _write(self, *lines: str) -> None:
        self.terminal.stream.write("".join(f"{printable(line)}\n" for line in lines))
        self.terminal.flush()


def logged(job: Job) -> list[tuple[str, str, str]]:
    """The lines of a job's log: level, message, whole line. None of them if the log is older than the job."""
    if job.log is None or (lenient.changed(job.log) or 0.0) < job.began - CLOCKS_S:
        return []
    lines = lenient.end(job.log, LOG_TAIL).decode(errors="replace").splitlines()
    return [(found[1], found[2], line) for line in lines if (found := cli.LINE.fullmatch(line))]
