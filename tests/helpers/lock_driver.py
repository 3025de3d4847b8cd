"""A process that asks for a folder's lock as if on another host, and then follows its standard input.

    python lock_driver.py FOLDER '{"host": "node1", "wait": true, "locks": "shared", "PATIENCE_S": 0.5, ...}'

`locks`: the file system's locks reach all hosts (shared), only one host (local), or there are none (none).

Prints `poll` each time it has looked and does not have the folder. Then prints `held` (`held after waiting`
if it had to wait), or the error. After that it answers each line of its input with `mine`, or with the error
of lock.check; for a line `fork` it first forks a child that ends. The process ends at the end of its input.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys

from cbtm_pipeline.base import lock


class PrintPolls(logging.Handler):
    """Prints a line for each decision that does not give us the folder."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.DEBUG and record.args[1] in ("wait", "watch"):  # type: ignore[index]
            print("poll", flush=True)


def no_locks(fd: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def main() -> None:
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    host, wait, locks = options.pop("host"), options.pop("wait", False), options.pop("locks", "shared")
    socket.gethostname = lambda: host
    if locks == "local":  # there is one process on every host, so no other process on this host has the lock
        fcntl.flock = lambda fd, operation: None
    if locks == "none":
        fcntl.flock = no_locks
    for name, seconds in options.items():
        setattr(lock, name, seconds)
    lock.log.addHandler(PrintPolls())
    lock.log.setLevel(logging.DEBUG)
    try:
        print("held after waiting" if lock.hold(folder, wait) else "held", flush=True)
    except ValueError as error:
        print(error, flush=True)
        return
    for line in sys.stdin:
        if line == "fork\n":
            if (pid := os.fork()) == 0:
                sys.exit()
            os.waitpid(pid, 0)
        try:
            lock.check()
            print("mine", flush=True)
        except ValueError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
