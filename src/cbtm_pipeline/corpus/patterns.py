"""The paths that a glob matches. Unlike in Python's glob, a folder that cannot be read is an error.

Python's glob passes over such a folder, and the text in it would be missing without a word.
"""

import fnmatch
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_MAGIC = "*?["


def is_glob(pattern: str) -> bool:
    """Whether a pattern has signs of a glob."""
    return any(sign in pattern for sign in _MAGIC)


def start(pattern: Path) -> Path:
    """The folder in which a glob begins to search."""
    parts = pattern.parts
    return Path(*parts[: next(i for i, part in enumerate(parts) if is_glob(part))])


def match(pattern: Path) -> list[Path]:
    """The paths that match, sorted. `**` stands for any folders; hidden names need a dot in the pattern.

    Raises OSError for a folder that cannot be read, and for a link that leads nowhere where a folder is
    looked for.
    """
    parts = pattern.parts
    root = Path(pattern.anchor or ".")
    found = _match(root, parts[1:] if pattern.anchor else parts, ())
    return [Path(path) for path in sorted({str(path) for path in found})]


def _match(folder: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The paths below `folder` that match the parts. `above` has the folders that a `**` went through."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        yield from _match_any_folders(folder, parts, above)
    elif is_glob(first):
        for name in listed(folder):
            is_hidden = name.startswith(".") and not first.startswith(".")
            if not is_hidden and fnmatch.fnmatchcase(name, first) and (not rest or is_folder(folder / name)):
                yield from _match(folder / name, rest, ())
    elif is_folder(folder / first) if rest else _is_there(folder / first):
        yield from _match(folder / first, rest, ())


def _match_any_folders(
    folder: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[Path]:
    """The paths that match `**` and what follows it. A link back to a folder above is not followed."""
    about = folder.stat()
    here = (about.st_dev, about.st_ino)
    if here in above:
        return
    yield from _match(folder, parts[1:], ())
    for name in listed(folder):
        if name.startswith("."):
            continue
        if is_folder(folder / name):
            yield from _match(folder / name, parts, (*above, here))
        elif len(parts) == 1:
            yield folder / name


def _is_there(path: Path) -> bool:
    """Whether there is something at a path. Raises OSError if that cannot be said."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listed(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises OSError if it cannot be read."""
    return sorted(os.listdir(folder))  # noqa: PTH208 (names are enough)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder or leads to one.

    Raises OSError if that cannot be said: for a link that leads nowhere, or into a folder that cannot be
    read. Such a link may stand for text.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise
        return False
