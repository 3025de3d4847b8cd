"""What all command lines share: errors of one line, log lines on stderr and in a file, progress lines."""

import argparse
import logging
import logging.handlers
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

from cbtm_pipeline.base.printable import printable, shortened
from cbtm_pipeline.base.publish import open_file

# Exit status of a training that a signal stopped. Its state is saved; started again, it goes on from there.
EXIT_SAVED = 85
# With this variable set to 1, stderr shows few lines (see _Few); the log file has all of them.
BRIEF = "CBTM_BRIEF"
NEWS = {"is_news": True}  # `log.info(..., extra=NEWS)`: stderr shows this line in any case
# Level and message of a line.
LINE = re.compile(r"\d\d:\d\d:\d\d ([A-Z]) (?:(?:expert|score|tasks) )?\S+ +(.+)")

log = logging.getLogger("cbtm")


def parser(description: str | None, config: bool = True) -> argparse.ArgumentParser:
    """An argument parser with the options that modules share: `--log`, and `--config` if `config` is true."""
    p = argparse.ArgumentParser(
        prog=_command(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if config:
        p.add_argument(
            "--config",
            required=True,
            type=Path,
            help="config.yaml, or the config.json that a run leaves in its outdir",
        )
    p.add_argument("--log", type=Path, help="also write the log lines to this file")
    return p


def whole(value: str) -> int:
    """A number of the command line, 1 or more."""
    if (number := int(value)) < 1:
        raise ValueError(value)
    return number


whole.__name__ = "whole number above 0"  # argparse names it in its message


def _command() -> str | None:
    """How this process was started: `python -m <module>`; None (the name of the program) otherwise."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else None


class _LogFile(logging.handlers.WatchedFileHandler):
    """A log file that is made again when it was deleted. Snakemake may delete the log of a running job.

    If it cannot be written any more, one line on stderr says so, and the work goes on.
    """

    is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_broken:
            self.is_broken = True
            print(f"{self.baseFilename}: {error.strerror}. Lines are missing there.", file=sys.stderr)

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND), "a", encoding=self.encoding)


class _Few(logging.Filter):
    """Lets through warnings, errors and news; of the other lines, one a minute as a sign of life.

    After ten minutes the pauses grow: each is a tenth of the time so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.began = self.shown = time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        pause = max(60.0, (now - self.began) / 10)
        is_shown = record.levelno > logging.INFO or hasattr(record, "is_news") or now - self.shown >= pause
        if is_shown:
            self.shown = now
        return is_shown


class _OneLine(logging.Formatter):
    """Makes one line of each message: ids, keys and names of files may hold anything."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(shortened(record.message), keep="")
        return super().formatMessage(record)


def formatter(label: str) -> logging.Formatter:
    """The format of log lines, which LINE matches."""
    return _OneLine(f"%(asctime)s %(levelname).1s {label:<12} %(message)s", "%H:%M:%S")


def start_logging(label: str, log_file: Path | None) -> None:
    """Send log lines to stderr and the file, each with its time and `label`, a name of a rule or expert."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file:
        handlers.append(_LogFile(log_file, encoding="utf-8"))
        if os.environ.get(BRIEF) == "1":
            handlers[0].addFilter(_Few())
    for handler in handlers:
        handler.setFormatter(formatter(label))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def run(main: Callable[[], None]) -> None:
    """Run `main`. Errors that users can cause (ValueError, OSError, MemoryError) become one line, status 1.

    With CBTM_DEBUG=1 in the environment, the error comes with its stack.
    """
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("CBTM_DEBUG") == "1":
            raise
        one_line = " ".join(explain(error).split())
        if log.handlers:
            log.error(one_line)
        else:
            print(one_line, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def explain(error: BaseException) -> str:
    """What an error says, printable: one line, or several for several faults of a config."""
    return printable("\n".join(map(shortened, _message(error).splitlines())))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        advice = "Check the path, its rights and the free space."
        return f"{error.filename}: {error.strerror}. Expected to read or write it. {advice}"
    if isinstance(error, OSError) and error.errno is not None:  # the library did not say which file
        advice = "Check the free space of the outdir and of the folder for temporary files."
        return f"a file: {error.strerror}. Expected to read or write it. {advice}"
    return str(error) or type(error).__name__


class Progress:
    """Progress lines at most every few seconds: `done/total unit  rate  ETA`. Threads may share it."""

    def __init__(self, what: str, total: float | None, unit: str, every_s: float = 5.0):
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.done, self.began = 0.0, time.monotonic()
        self.logged = self.began  # when the last line was written
        self.lock = threading.Lock()

    def add(self, n: float, more: str = "") -> None:
        """Count `n` more units, and log a line that ends with `more` if the last line is old enough."""
        with self.lock:
            self.done += n
            now = time.monotonic()
            if now - self.logged < self.every_s:
                return
            self.logged = now
        rate = self.done / (now - self.began)
        share = ""
        if self.total and rate:
            share = f"{100 * self.done / self.total:.0f}%  ETA {(self.total - self.done) / rate:.0f} s  "
        line = "%s  %.4g %s  %s%.4g %s/s  %s"
        log.info(line, self.what, self.done, self.unit, share, rate, self.unit, more)
