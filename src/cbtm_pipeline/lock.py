"""One writer per folder: a lock that vanishes with the process that holds it, however that process ends."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from cbtm_pipeline.cli import log

_held: dict[str, int] = {}  # the descriptors stay open, so locked, until the process ends


def hold(folder: str | Path, wait: bool = False) -> bool:
    """Lock `folder` for this process. While another process has it: wait for that one to end, or raise ValueError that names it.

    Returns whether it had to wait. Where the file system knows no locks, says so and goes on.
    """
    path = Path(folder, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    said = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(fd, 1000, 0).decode()
            if not wait:
                os.close(fd)
                raise ValueError(f"{folder}: another run is writing here ({holder}). Expected to be alone. Wait or stop it.") from None
            if not said:
                log.info("%s: waiting for the process that is writing here: %s", folder, holder)
                said = True
            time.sleep(0.5)
        except OSError as error:
            log.warning("%s: no file locks here (%s). See to it that one run at a time writes to it.", folder, error.strerror)
            break
    os.ftruncate(fd, 0)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    os.pwrite(fd, json.dumps({name: value for name, value in me.items() if value is not None}).encode(), 0)
    _held[str(path)] = fd
    return said
