"""Which files a corpus consists of, from the patterns in corpus.train and corpus.eval. Imports nothing heavy: the workflow asks it too."""

import errno
import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

DEMO = "builtin:demo"  # stands in corpus.train for the built-in corpus
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_EXPECTED = (
    f"Expected files that end in {' '.join(SUFFIXES)}, the first three also with {' or '.join(COMPRESSIONS)}."
)


def format_of(path: str | Path) -> tuple[str, str] | None:
    """(suffix, compression) of a file by its name, such as (".jsonl", ".zst") or (".txt", ""); None when it is no corpus file."""
    name = str(path).lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    suffix = next((s for s in SUFFIXES if name.removesuffix(compression).endswith(s)), None)
    return None if suffix is None or (suffix == ".parquet" and compression) else (suffix, compression)


class File(NamedTuple):
    """A file of the corpus. `number` counts the files from 0; `name` is short and does not depend on where the corpus lies."""

    number: int
    path: Path
    name: str


def find(train: Iterable[str], held_out: Iterable[str] | None) -> list[str]:
    """Every file of the corpus, as the workflow names its inputs. `builtin:demo` stays as it is: the workflow builds that file."""
    return [str(file) for file in input_files([*train, *(held_out or [])], DEMO)]


def input_files(patterns: Iterable[str], demo: str | Path | None = None) -> list[Path]:
    """The files that the patterns stand for: in the order of the patterns, within a pattern sorted, each file once.

    A pattern is a file, a folder (all corpus files below it, hidden ones left out), a glob, or `builtin:demo`, for which `demo` stands, a
    file that need not exist yet. Raises ValueError for a pattern without a matching file, OSError for an unreadable folder.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        if pattern == DEMO and demo is None:
            raise ValueError(
                f"{DEMO}: no file given for it. Expected --demo FILE. Write one: python -m cbtm_pipeline.demo_corpus --out FILE"
            )
        for file in [Path(str(demo))] if pattern == DEMO else _matching(pattern):
            files.setdefault(file.absolute(), file)
    return list(files.values())


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists() or path.is_symlink():
        if not path.is_dir() and format_of(path) is None:
            raise ValueError(
                f"{pattern}: unknown format. {_EXPECTED} Convert the file, or correct corpus.train or corpus.eval."
            )
        roots = [path]
    elif any(c in pattern for c in "*?["):
        roots = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207, as Path.glob lists hidden files
    else:
        raise ValueError(
            f"{pattern}: no such file. Expected a file, a folder or a glob. Correct corpus.train or corpus.eval."
        )
    files = [file for root in roots for file in _below(root)]
    if not files:
        raise ValueError(f"{pattern}: no matching file. {_EXPECTED} Correct corpus.train or corpus.eval.")
    return files


def _below(root: Path) -> list[Path]:
    """`root` itself if it is a corpus file, else the sorted corpus files below it. A dangling link is listed, so that reading it fails."""
    if not root.is_dir():
        return [root] if format_of(root) else []
    files: list[str] = []
    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        if (real := Path(folder).resolve()) in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        files += [f"{folder}/{name}" for name in names if not name.startswith(".") and format_of(name)]
    return [Path(file) for file in sorted(files)]


def _refuse(error: OSError) -> None:
    raise error


def name(paths: Sequence[Path]) -> list[File]:
    """Give each file its number and its name: the file's own name, or where several files have the same, the path from the folder that
    these have in common."""
    same: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        same[path.name].append(path.absolute())
    bases = {
        name: os.path.commonpath([path.parent for path in group])
        for name, group in same.items()
        if len(group) > 1
    }
    names = [os.path.relpath(path, bases[path.name]) if path.name in bases else path.name for path in paths]
    return [
        File(number, path, printable(name))
        for number, (path, name) in enumerate(zip(paths, names, strict=True))
    ]


def n_bytes(files: Iterable[File]) -> int:
    """Size of the files as they lie on the disk. Raises OSError, before any work is done, for a file that cannot be read."""
    total = 0
    for file in files:
        total += file.path.stat().st_size
        if not os.access(file.path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.path))
    return total


def printable(name: str | Path) -> str:
    """A file name as valid UTF-8, which file systems do not ask for."""
    return os.fsencode(name).decode("utf-8", "replace")
