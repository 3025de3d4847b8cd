"""One writer per folder: a lock that vanishes with the process that holds it, however that process ends."""

import fcntl
import json
import os
import socket
from pathlib import Path

_held: dict[str, int] = {}  # the descriptors stay open, so locked, until the process ends


def hold(folder: str | Path) -> None:
    """Lock `folder` for this process. Raises ValueError that names the holder when another process has it."""
    path = Path(folder, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 1000, 0).decode()
        os.close(fd)
        raise ValueError(f"{folder}: another run is writing here ({holder}). Expected to be alone. Wait for it or stop it.") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    _held[str(path)] = fd
