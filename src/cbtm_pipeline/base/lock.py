"""One writer per folder: a lock that vanishes with the process that holds it, and a record that shows other hosts whether it lives.

The lock is flock's: beyond doubt on one host, but some file systems do not tell other hosts of it, and some servers keep the lock of a host
that is gone. So the holder rewrites a record every few seconds and empties it at its end, and who finds the record of another host believes
what it sees there: a record that changes belongs to a live process, one that stands still to a dead one. Only the watcher's own clock
counts. A dead holder's file is replaced by a new one; should that holder come back to life (a suspended machine, a stalled file system), it
finds a record that is not its own, and stops before it writes again. If it is suspended once more between looking and writing, it writes
what its successor writes, byte by byte: a training is a function of its inputs. Where there are no locks at all, the record has to do.
"""

import atexit
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from cbtm_pipeline.base.cli import log

BEAT_S = 10.0  # how often a holder rewrites its record
PATIENCE_S = 40.0  # how long the record of another host has to stand still until its holder is dead, where the lock is free
STALE_S = 300.0  # and where it is held: a file server gives back the lock of a lost client by itself within 180 s, if ever
POLL_S = 0.5
_SIZE = 512  # of a record: all are written in one piece of the same size, so that nobody reads half of one


class _Lease:
    """A lock file of this process, its descriptor open, so locked, until the process ends."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd, self.beat, self.ended = path, fd, 0, threading.Event()
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        about["restart"] = os.environ.get("SLURM_RESTART_COUNT")
        self.me = {name: value for name, value in about.items() if value is not None}
        self.thread = threading.Thread(target=self.keep_beating, name=f"beat of {path}", daemon=True)

    def write(self) -> None:
        os.pwrite(self.fd, json.dumps(self.me | {"beat": self.beat}).ljust(_SIZE).encode(), 0)
        os.fsync(self.fd)  # until then other hosts may see the old one

    def successor(self) -> str | None:
        """The record in the file, if it is not ours."""
        holder = _read(self.path)
        return (
            None
            if _parse(holder) | {"beat": 0} == self.me | {"beat": 0}
            else holder or "its lock file is empty or gone"
        )

    def keep_beating(self) -> None:
        while not self.ended.wait(BEAT_S):
            try:
                if successor := self.successor():
                    log.warning("%s: taken over by another process: %s", self.path.parent, successor)
                    return
                self.beat += 1
                self.write()
            except OSError as error:
                log.warning("%s: %s; trying again in %g s", self.path, error.strerror, BEAT_S)

    def end(self) -> None:
        self.ended.set()
        self.thread.join(BEAT_S)
        if os.getpid() == self.me["pid"] and not self.successor():
            os.ftruncate(self.fd, 0)


_held: list[_Lease] = []


def hold(folder: str | Path, wait: bool = False) -> bool:
    """Lock `folder` for this process. While another process has it: wait for that one to end, or raise ValueError that names it.

    Returns whether it had to wait. To see whether a holder on another host lives takes up to PATIENCE_S or STALE_S, even without `wait`.
    """
    path, here = Path(folder, ".lock"), socket.gethostname()
    path.parent.mkdir(parents=True, exist_ok=True)
    seen, since, alive, said = "", time.monotonic(), False, False
    while True:
        fd, free = _try(path)
        if (holder := _read(path)) != seen:
            seen, since, alive = holder, time.monotonic(), seen != ""
        elsewhere = holder != "" and (
            free is None or _parse(holder).get("host") != here
        )  # flock says nothing of it
        dead = elsewhere and time.monotonic() - since > (STALE_S if free is False else PATIENCE_S)
        if dead or (free is not False and not elsewhere):
            break
        os.close(fd)
        if not wait and (alive or not elsewhere):
            who = holder or "just starting or ending"
            raise ValueError(
                f"{folder}: another run is writing here ({who}). Expected to be alone. Wait or stop it."
            )
        if not said:
            log.warning(
                "%s: waiting for the process that is writing here%s: %s",
                folder,
                ", if it lives" if elsewhere else "",
                holder,
            )
            said = True
        time.sleep(POLL_S)
    tmp = path.with_name(f".lock.{here}-{os.getpid()}.tmp")
    if dead:
        log.warning(
            "%s: taken over from a process that has shown no sign of life for %.0f s: %s",
            folder,
            time.monotonic() - since,
            holder,
        )
        os.close(fd)
        fd, _ = _try(tmp)
    lease = _Lease(path, fd)
    lease.write()
    if dead:
        tmp.replace(path)
    lease.thread.start()
    atexit.register(lease.end)
    _held.append(lease)
    return said


def check() -> None:
    """Raise ValueError if another process has taken over a folder that this one holds. To be asked right before every write that counts."""
    for lease in _held:
        if successor := lease.successor():
            raise ValueError(
                f"{lease.path.parent}: taken over by another process ({successor}). Expected to be the only one. "
                "Nothing to do if that one goes on; else start again."
            )


def _try(path: Path) -> tuple[int, bool | None]:
    """Open and lock: the descriptor, and whether the lock was free; None where the file system knows no locks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return fd, False
    except OSError:
        return fd, None
    return fd, os.path.samestat(os.fstat(fd), path.stat())  # False: replaced since it was opened


def _read(path: Path) -> str:
    """The record in a lock file, opened anew so that a network file system asks its server."""
    return path.read_text("utf-8", errors="replace").strip() if path.exists() else ""


def _parse(record: str) -> dict:
    try:
        return dict(json.loads(record))
    except (ValueError, TypeError):
        return {}
