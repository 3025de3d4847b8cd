"""Who else may write to a folder from which code is run. Standard library only.

On Slurm, submitit carries each job to its node in a pickle below the outdir, and the launcher believes the
records there. Who can write to that folder, or rename it, can run code as the user. A folder to which
everybody may write is refused. One to which a group may write, or that belongs to another user, is usual for
a project, and gets one warning. Access control lists are not looked at.
"""

import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline.base.cli import log


class Other(NamedTuple):
    """Somebody else who may write to `folder`. `change` is the command that ends it, if the user can."""

    folder: Path
    who: str
    is_everybody: bool
    change: str | None


def others(folder: Path) -> Iterator[Other]:
    """Who else may write to a folder, or put another one in its place, the nearest first.

    In a sticky folder such as /tmp, nobody can rename what is not theirs; so it counts only if it is the
    folder itself. A folder that does not exist yet will be the user's.
    """
    path = folder.resolve()
    for place in (path, *path.parents):
        try:
            about = place.stat()
        except OSError:
            continue
        can_rename = place == path or not about.st_mode & stat.S_ISVTX
        mine = about.st_uid == os.geteuid()
        name = shlex.quote(str(place))
        if about.st_mode & stat.S_IWOTH and can_rename:
            yield Other(place, "everybody", True, f"chmod o-w {name}" if mine else None)
        elif about.st_mode & stat.S_IWGRP and can_rename and not _is_own_group(about.st_gid):
            group = _name(grp.getgrgid, about.st_gid)
            yield Other(place, f"group {group}", False, f"chmod g-w {name}" if mine else None)
        elif not mine and about.st_uid != 0:
            yield Other(place, f"its owner, {_name(pwd.getpwuid, about.st_uid)},", False, None)


def _is_own_group(gid: int) -> bool:
    """Whether a group is root's, or the one that many systems give each user alone."""
    try:
        me = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return gid == 0
    return gid == 0 or (group.gr_name == me.pw_name and not set(group.gr_mem) - {me.pw_name})


def _name(get: object, number: int) -> str:
    try:
        return get(number)[0]  # pyright: ignore[reportCallIssue]
    except KeyError:
        return str(number)


def refuse_open(folder: Path) -> None:
    """Raise ValueError for a folder to which everybody may write: Slurm's jobs run code from it."""
    if found := next((other for other in others(folder) if other.is_everybody), None):
        todo = f"Run {found.change}, or choose" if found.change else "Choose"
        raise ValueError(
            f"{found.folder}: everybody may write there, and so run code as you in a job of Slurm. Expected "
            f"a folder of yours or of a group. {todo} another outdir."
        )


def warning(folder: Path) -> str | None:
    """What it means that others may write to a folder, in one line; None if nobody else may."""
    if (found := next(others(folder), None)) is None:
        return None
    todo = f"run {found.change}" if found.change else "choose another outdir"
    return (
        f"{found.folder}: {found.who} may write there, too, and so change results, and run code as you in a "
        f"job of Slurm. If that is not what you want, {todo}"
    )


def local_warning(folder: Path) -> str | None:
    """What it means for a run without Slurm that everybody may write to its folder; None if they may not."""
    if (found := next((other for other in others(folder) if other.is_everybody), None)) is None:
        return None
    todo = f"run {found.change}" if found.change else "choose another outdir"
    return f"{found.folder}: everybody may write there, and so change results. To end that, {todo}"


def warn_once(folder: Path, marker: Path) -> None:
    """Log the warning, unless the file `marker` says that it was logged before. Makes this file."""
    if (line := warning(folder)) is None:
        return
    try:
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
    except FileExistsError:
        return
    log.warning("%s", line)
