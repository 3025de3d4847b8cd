"""Publish a file: it is whole or absent. Standard library only, as each Slurm job's launcher uses it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = socket.gethostname()


@contextmanager
def publish(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path. On a clean exit, sync the file to disk and rename it to `path`; else remove it.

    Also removes temporary files of `path` that dead processes of this host left. Raises OSError with `path`
    as its file name where the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.{_HOST}-*.tmp"):
        if not _alive(int(leftover.name.rsplit("-", 1)[1].removesuffix(".tmp"))):
            leftover.unlink(missing_ok=True)
    tmp = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        yield tmp
        _fsync(tmp)
        tmp.replace(path)
        _fsync(path.parent)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(tmp):
            raise  # the error is of another file, used while this one was written
        # pyarrow and numpy report a full disk without the name of the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
