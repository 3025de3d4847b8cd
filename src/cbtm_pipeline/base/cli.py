"""What every module's command line shares: one-line errors, and progress as plain lines on stderr and in a log file."""

import argparse
import logging
import logging.handlers
import os
import sys
import threading
import time
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

EXIT_SAVED = (
    85  # exit status of a training that a signal stopped: its state is saved, start it again to go on
)

log = logging.getLogger("cbtm")


def parser(description: str | None, config: bool = True) -> argparse.ArgumentParser:
    """An argument parser with the options that modules share: `--config` and `--log`."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config:
        p.add_argument(
            "--config",
            required=True,
            type=Path,
            help="config.yaml, or the config.json that a run leaves in its outdir",
        )
    p.add_argument("--log", type=Path, help="also write the log lines to this file")
    return p


class _LogFile(logging.handlers.WatchedFileHandler):
    """A log file that comes back when it is deleted: Snakemake does that when it takes up a job that already runs."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def start_logging(label: str, log_file: Path | None) -> None:
    """Send the project's log lines, each with its time and the label (rule or expert), to stderr and the file."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file:
        handlers.append(_LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname).1s {label:<12} %(message)s", "%H:%M:%S")
        )
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def run(main: Callable[[], None]) -> None:
    """Run `main`; what people can cause (ValueError, OSError) becomes one line and exit status 1. CBTM_DEBUG=1 shows the stack."""
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("CBTM_DEBUG") == "1":
            raise
        one_line = " ".join(_message(error).split())
        if log.handlers:
            log.error(one_line)
        else:
            print(one_line, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Expected to read or write it. Check the path, its rights and the free space."
    return str(error) or type(error).__name__


class Progress:
    """Progress lines at most every few seconds: `done/total unit  rate  ETA`. Threads may share it."""

    def __init__(self, what: str, total: float | None, unit: str, every_s: float = 5.0):
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.done, self.began = 0.0, time.monotonic()
        self.said = self.began
        self.lock = threading.Lock()

    def add(self, n: float, more: str = "") -> None:
        """Count `n` more units; say so if the last line is old enough."""
        with self.lock:
            self.done += n
            now = time.monotonic()
            if now - self.said < self.every_s:
                return
            self.said = now
        rate = self.done / (now - self.began)
        share = (
            f"{100 * self.done / self.total:.0f}%  ETA {(self.total - self.done) / rate:.0f} s  "
            if self.total and rate
            else ""
        )
        log.info(
            "%s  %.4g %s  %s%.4g %s/s  %s", self.what, self.done, self.unit, share, rate, self.unit, more
        )
