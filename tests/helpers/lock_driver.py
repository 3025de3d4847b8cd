"""A process that asks for a folder's lock as if on another host, and then does what its standard input says.

    python lock_driver.py FOLDER '{"host": "node1", "wait": true, "locks": "shared", "PATIENCE_S": 0.5, ...}'

`locks` says what the file system's locks reach: all hosts (shared), only one (local), or there are none (none). Prints `held`, with `after
waiting` if so, or why not; then for every line `mine` or the error, after a `fork` has come and gone. It ends at the end of its input.
"""

import errno
import fcntl
import json
import os
import socket
import sys

from cbtm_pipeline.base import lock


def no_locks(fd: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def main() -> None:
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    host, wait, locks = options.pop("host"), options.pop("wait", False), options.pop("locks", "shared")
    socket.gethostname = lambda: host
    if locks == "local":  # with one process on every host, nobody is ever in the way
        fcntl.flock = lambda fd, operation: None
    if locks == "none":
        fcntl.flock = no_locks
    for name, seconds in options.items():
        setattr(lock, name, seconds)
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
