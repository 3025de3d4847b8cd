"""One writer per folder: a lock that ends with its process, and a record that shows that the process lives.

The lock is flock's. On one host it is beyond doubt. Between hosts it is not: some file systems do not show
locks to other hosts, and some servers keep the lock of a host that is gone. So the holder also writes a
record into the lock file, renews it every few seconds and empties it at its end. A process that finds the
record of another host watches it: a record that changes has a live holder, one that stands still has a dead
one. Only the watcher's own clock counts. `decide` holds the whole table. Where the file system has no locks
at all, the record decides alone.

A dead holder's file is replaced by a new one. If that holder comes back to life (a suspended machine, a
stalled file system), it finds a record that is not its own, and stops before it writes again. If it is
suspended between that check and the write, it writes what its successor writes, byte by byte: a training is a
function of its inputs.
"""

import atexit
import enum
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.publish import open_file

BEAT_S = 10.0  # a holder renews its record this often
# A holder on another host is dead when its record has not changed for PATIENCE_S while its lock is free, or
# for STALE_S while its lock is held. (A file server releases a lost client's lock within 180 s, if ever.)
PATIENCE_S = 40.0
STALE_S = 300.0
POLL_S = 0.5
NAME = ".lock"  # of the lock file, in the folder that it locks
# Bytes of a record: all are written in one piece of the same size, so that nobody reads half of one.
_SIZE = 512


class Flock(enum.Enum):
    """What flock says when we ask for the lock."""

    FREE = "free"  # it is ours now
    HELD = "held"  # another process has it
    UNSUPPORTED = "unsupported"  # the file system has no locks


class Writer(enum.Enum):
    """Who wrote the record in the lock file."""

    NOBODY = "nobody"  # it is empty: no holder, or one that is just starting or ending
    THIS_HOST = "this host"
    OTHER_HOST = "another host"


class Action(enum.Enum):
    """What a process does that asks for a folder."""

    TAKE = "take"  # nobody has the folder
    TAKE_OVER = "take over"  # its holder is dead: replace the lock file
    WATCH = "watch"  # its holder may be dead: look again
    WAIT = "wait"  # its holder lives: look again, or give up


def decide(flock: Flock, writer: Writer, still_s: float, changed: bool) -> Action:
    """What to do with a folder in this state.

    `still_s`: seconds for which the record has not changed while we watched it. `changed`: whether it did
    before that.

    flock        record of      action
    -----------  -------------  --------------------------------------------
    free         nobody         take
    free         this host      take
    free         another host   take over once it stands still for PATIENCE_S
    held         nobody         wait
    held         this host      wait
    held         another host   take over once it stands still for STALE_S
    unsupported  nobody         take
    unsupported  either host    take over once it stands still for PATIENCE_S

    While a record has not stood still long enough: wait if it has changed, else watch.
    """
    match flock, writer:
        case (Flock.FREE | Flock.UNSUPPORTED, Writer.NOBODY) | (Flock.FREE, Writer.THIS_HOST):
            return Action.TAKE
        case Flock.HELD, Writer.NOBODY | Writer.THIS_HOST:
            return Action.WAIT
    if still_s > (STALE_S if flock is Flock.HELD else PATIENCE_S):
        return Action.TAKE_OVER
    return Action.WAIT if changed else Action.WATCH


class _Watch:
    """What a process has seen of the record in a lock file."""

    def __init__(self, path: Path):
        self.path = path
        self.record, self.since, self.changed = "", time.monotonic(), False

    def look(self) -> None:
        if (record := _read(self.path)) != self.record:
            self.changed = self.record != ""
            self.record, self.since = record, time.monotonic()

    @property
    def still_s(self) -> float:
        return time.monotonic() - self.since

    @property
    def writer(self) -> Writer:
        if not self.record:
            return Writer.NOBODY
        here = _parse(self.record).get("host") == socket.gethostname()
        return Writer.THIS_HOST if here else Writer.OTHER_HOST


class _Lease:
    """A lock file of this process. Its descriptor stays open, so it stays locked, until the process ends."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd, self.beat, self.ended = path, fd, 0, threading.Event()
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT"),
        }
        self.record = {name: value for name, value in record.items() if value is not None}
        self.thread = threading.Thread(target=self.keep_beating, name=f"beat of {path}", daemon=True)

    def write(self) -> None:
        os.pwrite(self.fd, json.dumps(self.record | {"beat": self.beat}).ljust(_SIZE).encode(), 0)
        os.fsync(self.fd)  # until then, other hosts may see the old record

    def successor(self) -> str | None:
        """The record in the file if it is not ours, else None."""
        found = _read(self.path)
        if _parse(found) | {"beat": 0} == self.record | {"beat": 0}:
            return None
        return found or "its lock file is empty or gone"

    def keep_beating(self) -> None:
        while not self.ended.wait(BEAT_S):
            try:
                if successor := self.successor():
                    log.warning("%s: taken over by another process: %s", self.path.parent, who(successor))
                    return
                self.beat += 1
                self.write()
            except OSError as error:
                log.warning("%s: %s; trying again in %g s", self.path, error.strerror, BEAT_S)

    def end(self) -> None:
        self.ended.set()
        self.thread.join(BEAT_S)
        if os.getpid() == self.record["pid"] and not self.successor():
            os.ftruncate(self.fd, 0)


_held: list[_Lease] = []


def hold(folder: str | Path, wait: bool = False, name: str = NAME) -> bool:
    """Lock `folder` for this process until it ends, and return whether it had to wait for that.

    Locks of another `name` are independent: a command has one, and the Snakemake that it starts the usual.
    While another process has the folder: wait for its end, or without `wait` raise ValueError that names it.
    It takes up to PATIENCE_S or STALE_S to see whether a holder on another host lives, even without `wait`.
    """
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    watch, has_waited = _Watch(path), False
    while True:
        fd, flock = _lock(path)
        watch.look()
        action = decide(flock, watch.writer, watch.still_s, watch.changed)
        log.debug("%s: %s (%s, record of %s)", folder, action.value, flock.value, watch.writer.value)
        if action in (Action.TAKE, Action.TAKE_OVER):
            break
        os.close(fd)
        if action is Action.WAIT and not wait:
            raise ValueError(
                f"{folder}: another run is writing here ({who(watch.record)}). Expected to be alone. Wait or "
                "stop it."
            )
        if not has_waited:
            doubt = ", if it lives" if action is Action.WATCH else ""
            log.warning(
                "%s: waiting for the process that writes here%s: %s", folder, doubt, who(watch.record)
            )
        has_waited = True
        time.sleep(POLL_S)
    if action is Action.TAKE_OVER:
        still = f"{watch.still_s:.0f} s"
        log.warning(
            "%s: taken over, its holder shows no sign of life for %s: %s", folder, still, who(watch.record)
        )
        os.close(fd)
        lease = _replace(path)
    else:
        lease = _Lease(path, fd)
        lease.write()
    lease.thread.start()
    atexit.register(lease.end)
    _held.append(lease)
    return has_waited


def release(folder: str | Path, name: str = NAME) -> None:
    """Give a lock of this process back before it ends."""
    for lease in [lease for lease in _held if lease.path == Path(folder, name)]:
        lease.end()
        os.close(lease.fd)
        atexit.unregister(lease.end)
        _held.remove(lease)


def check() -> None:
    """Raise ValueError if another process has taken over a folder of this one.

    Call it right before each write.
    """
    for lease in _held:
        if successor := lease.successor():
            raise ValueError(
                f"{lease.path.parent}: taken over by another process ({who(successor)}). "
                "Expected to be the only one. Let that one go on; if it does not, start again."
            )


def _replace(path: Path) -> _Lease:
    """Put a new lock file, which is ours, in the place of a dead holder's."""
    tmp = path.with_name(f".lock.{socket.gethostname()}-{os.getpid()}.{os.urandom(8).hex()}.tmp")
    fd, _ = _lock(tmp)
    lease = _Lease(path, fd)
    lease.write()
    tmp.replace(path)
    return lease


def _lock(path: Path) -> tuple[int, Flock]:
    """Open the file and try to lock it. Returns the open descriptor and what flock says."""
    fd = open_file(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return fd, Flock.HELD
    except OSError:
        return fd, Flock.UNSUPPORTED
    try:
        replaced = not os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        replaced = True  # between our open and our lock: look again
    return fd, Flock.HELD if replaced else Flock.FREE


def _read(path: Path) -> str:
    """The record in a lock file. Opened anew each time, so that a network file system asks its server.

    No more than _SIZE bytes are read, whatever others have written there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, _SIZE).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)


def who(record: str) -> str:
    """The holder of a lock by its record, for people: `process 123 on node7, job 45 of Slurm`."""
    found = _parse(record)
    if not {"pid", "host"} <= found.keys():
        return record or "just starting or ending"
    job = f", job {found['slurm_job']} of Slurm" if "slurm_job" in found else ""
    return f"process {found['pid']} on {found['host']}{job}"


def _parse(record: str) -> dict:
    """A record's content; nothing of one that is no JSON object."""
    try:
        return dict(json.loads(record))
    except (ValueError, TypeError):
        return {}
