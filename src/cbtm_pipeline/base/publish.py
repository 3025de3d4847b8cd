"""Publish a file: it is whole or absent. Standard library only, as each Slurm job's launcher uses it.

Others may write to the folders of a run. So no name that they can foresee is opened in a way that follows
links: temporary names are random, folders for temporary files are made anew, and the few files that keep
their names (locks, logs, histories) are opened by `open_file`.
"""

import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = socket.gethostname()
_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def publish(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path. On a clean exit, sync the file to disk and rename it to `path`; else remove it.

    Also removes temporary files of `path` that dead processes of this host left. Raises OSError with `path`
    as its file name where the file cannot be written, and ValueError for a path that is no name of a file.
    """
    path = Path(path)
    if not path.name:  # "/" or "."
        raise ValueError(f"{path}: a folder. Expected the name of a file to write. Give one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # nobody can put a link where a random name will be; the file itself is not made here, as some writers
    # make it as a hard link
    tmp = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.{os.urandom(8).hex()}.tmp")
    try:
        yield tmp
        _share(tmp)
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


def link_or_copy(path: Path, other: Path) -> None:
    """Make `other` a second link of a file, or a copy where there are no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _share(path: Path) -> None:
    """Give a file the rights that the user's umask says, if its writer made it for the user alone.

    safetensors does. A file that is a hard link is another file, too, whose rights are not ours to change.
    """
    about = path.stat()
    if stat.S_IMODE(about.st_mode) == 0o600 and about.st_nlink == 1:
        path.chmod(0o666 & ~_UMASK)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` whose process, on this host, is dead."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_HOST)}-(\d{{1,9}})(\.[0-9a-f]+)?\.tmp")
    for other in os.listdir(path.parent):  # noqa: PTH208 (names are enough)
        if (found := name.fullmatch(other)) and not is_alive(int(found[1])):
            path.with_name(other).unlink(missing_ok=True)


def fresh(folder: Path) -> Path:
    """Make an empty folder. What was there goes; of a link, only the link. Returns the folder."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def open_file(path: Path, flags: int) -> int:
    """Open a file that keeps its name, as `os.open` does; it is made where it is missing.

    Raises ValueError for a link, which somebody may have put there to lead us to another file, and for what
    is no file.
    """
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _strange(path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _strange(path)
    return fd


def _strange(path: Path) -> ValueError:
    return ValueError(f"{path}: a link or no file. Expected a file of this run. Remove it, and start again.")


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
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
