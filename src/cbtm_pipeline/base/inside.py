"""Names of files that a file gives: they must stay below the folder of that file."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cbtm_pipeline.base.errors import Advice, said


def is_inside(name: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to. Links are not looked at."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def check(path: Path, names: Iterable[str], advice: Advice) -> None:
    """Raise ValueError for a name, given in the file `path`, that leads out of its folder."""
    for name in names:
        if not name or not is_inside(name):
            raise ValueError(
                f"{path}: it names {name}. Expected only files below {path.parent}, as others may have "
                f"written it. {said(advice)}"
            )
