"""The files of a corpus, found from the patterns in corpus.train and corpus.eval.

Imports nothing heavy, because the workflow uses it too.
"""

import errno
import os
import shlex
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline.corpus import patterns as globs
from cbtm_pipeline.corpus import run_folders
from cbtm_pipeline.corpus.formats import COMPRESSIONS, FORMATS

DEMO = "builtin:demo"  # stands for the built-in corpus in corpus.train


def format_of(path: str | Path) -> tuple[str, str] | None:
    """The suffix and compression in a file's name, such as (".jsonl", ".zst") or (".txt", "").

    None if the file is no corpus file.
    """
    name = str(path).lower()
    compression = next((c for c in COMPRESSIONS if name.endswith(c)), "")
    name = name.removesuffix(compression)
    suffix = max((s for s in FORMATS if name.endswith(s)), key=len, default=None)
    if suffix is None or (compression and not FORMATS[suffix].compressible):
        return None
    return suffix, compression


def unpacked(path: str | Path) -> float:
    """Bytes of text per byte of a corpus file, roughly, by its name."""
    suffix, compression = format_of(path) or ("", "")
    of_format = FORMATS[suffix].unpacked if suffix else 1
    return of_format * (COMPRESSIONS[compression].unpacked if compression else 1)


class File(NamedTuple):
    """A file of the corpus.

    `number` counts the files from 0. `name` is short and does not depend on the corpus folder.
    """

    number: int
    path: Path
    name: str


def find(train: Iterable[str], held_out: Iterable[str] | None, outdir: str | Path | None = None) -> list[str]:
    """Every file of the corpus, as the inputs of the workflow.

    `builtin:demo` stays: the workflow makes that file. `outdir` as for `input_files`.
    """
    outdir = None if outdir is None else Path(outdir)
    return [str(file) for file in input_files([*train, *(held_out or [])], DEMO, outdir)]


def input_files(
    patterns: Iterable[str], demo: str | Path | None = None, outdir: Path | None = None
) -> list[Path]:
    """The files that match the patterns: in the order of the patterns, sorted within a pattern, each file
    once.

    A pattern is a file, a folder (all corpus files below it, except hidden ones), a glob, or `builtin:demo`.
    The file `demo` replaces `builtin:demo` and need not exist yet. What runs have written below a folder is
    left out, and what the run at `outdir` writes there. Raises ValueError for a pattern without a matching
    file or for one that names outputs of that run, OSError for an unreadable folder, and for a link in a
    folder that leads nowhere.
    """
    files: dict[Path, Path] = {}
    outputs = run_folders.Outputs(outdir)
    for pattern in patterns:
        if pattern == DEMO and demo is None:
            raise ValueError(
                f"{DEMO}: no file given for it. Expected --demo FILE. "
                "Write one: python -m cbtm_pipeline.demo_corpus --out FILE"
            )
        for file in [Path(str(demo))] if pattern == DEMO else _matching(pattern, outputs):
            files.setdefault(file.absolute(), file)
    return list(files.values())


def _expected() -> str:
    compressible = [suffix for suffix, format_ in FORMATS.items() if format_.compressible]
    return (
        f"Expected files that end in {' '.join(FORMATS)}, where {' or '.join(COMPRESSIONS)} may follow "
        f"{' '.join(compressible)}."
    )


def _matching(pattern: str, outputs: run_folders.Outputs) -> list[Path]:
    roots = _roots(pattern, outputs)
    if roots == [path := Path(pattern).expanduser()] and not path.is_dir() and format_of(path) is None:
        todo = _conversion(path) or "Convert the file, or correct corpus.train or corpus.eval."
        raise ValueError(f"{pattern}: unknown format. {_expected()} {todo}")
    files = [file for root in roots for file in _below(root, outputs) if format_of(file)]
    if not files:
        others = [file for root in roots for file in _below(root, outputs)]
        todo = next(filter(None, map(_conversion, others)), "Correct corpus.train or corpus.eval.")
        raise ValueError(f"{pattern}: no matching file. {_expected()} {todo}")
    return files


def _conversion(path: Path) -> str | None:
    """What to type to convert a table of text, where no format reads it; None for other files."""
    suffix = next((s for s in _TABLES if path.name.lower().endswith((s, f"{s}.gz"))), None)
    if suffix is None:
        return None
    to = path.with_name(path.name[: path.name.lower().rindex(suffix)] + ".parquet")
    code = (
        "import sys; from pyarrow import csv, parquet; "
        f"table = csv.read_csv(sys.argv[1], parse_options=csv.ParseOptions(delimiter='{_TABLES[suffix]}', "
        "newlines_in_values=True)); parquet.write_table(table, sys.argv[2])"
    )
    return f"Convert it: python -c {shlex.quote(code)} {shlex.quote(str(path))} {shlex.quote(str(to))}"


_TABLES = {".csv": ",", ".tsv": r"\t"}  # by suffix, what separates their columns


def _roots(pattern: str, outputs: run_folders.Outputs) -> list[Path]:
    """The files and folders that a pattern names. Raises ValueError for a path that is not there.

    Of a glob, those that a run has written are left out, unless it names that run's folder.
    """
    if not pattern.strip():  # else it would be the current folder
        raise ValueError(
            "corpus: an empty path. Expected a file, a folder or a glob. Name one, or leave it out."
        )
    path = Path(pattern).expanduser()
    if path.exists() or path.is_symlink():
        outputs.refuse_own(pattern, path)
        return [path]
    if globs.is_glob(pattern):
        start = globs.start(path)
        outputs.refuse_own(pattern, start)
        found = globs.match(path)
        is_asked = outputs.written_by(start) is not None
        return found if is_asked else [p for p in found if outputs.written_by(p) is None]
    raise ValueError(
        f"{pattern}: no such file. Expected a file, a folder or a glob. Correct corpus.train or corpus.eval."
    )


def passed_over(patterns: Iterable[str], outdir: Path | None = None) -> list[Path]:
    """The files that the patterns match and that are not read, because their names say no format.

    What a run has written, or the run at `outdir` writes, does not count.
    """
    outputs = run_folders.Outputs(outdir)
    roots = [root for pattern in patterns if pattern != DEMO for root in _roots(pattern, outputs)]
    found = (file for root in roots for file in _below(root, outputs) if format_of(file) is None)
    return list({file.absolute(): file for file in found}.values())


def _below(root: Path, outputs: run_folders.Outputs) -> list[Path]:
    """`root` itself if it is no folder, else all files below it that are not hidden, sorted.

    What a run has written there is left out, unless `root` is part of that.

    A dangling link to a corpus file is listed, so that reading it fails and nothing is left out silently.
    Raises OSError for another one, which may have led to a folder.
    """
    if not root.is_dir():
        return [root]
    files: list[str] = []
    seen: set[Path] = set()
    is_asked = outputs.written_by(root) is not None
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        if (real := Path(folder).resolve()) in seen:  # a link leads back here
            subfolders.clear()
            continue
        seen.add(real)
        kept = {
            name
            for name in (*subfolders, *names)
            if not name.startswith(".") and (is_asked or outputs.written_by(Path(real, name)) is None)
        }
        kept -= _no_data(kept)
        subfolders[:] = [name for name in subfolders if name in kept]
        seen_names = [name for name in names if name in kept]
        for name in seen_names:
            if format_of(name) is None:
                globs.is_folder(Path(folder, name))
        files += [f"{folder}/{name}" for name in seen_names]
    return [Path(file) for file in sorted(files)]


# What other programs put beside their data, which is no text: folders, and JSON beside datasets' Arrow files.
_BOOKKEEPING = frozenset(["_delta_log", "_spark_metadata", "_temporary"])
_OF_DATASETS = frozenset(["dataset_dict.json", "dataset_info.json", "state.json"])


def _no_data(names: set[str]) -> set[str]:
    """Of the names in a folder, those that hold no data but say what the other files are."""
    of_datasets = _OF_DATASETS & names
    if not ("dataset_dict.json" in names or any(name.endswith(".arrow") for name in names)):
        of_datasets = frozenset()
    # datasets keeps what it has computed beside the data
    caches = {name for name in names if name.startswith("cache-") and name.endswith(".arrow") and of_datasets}
    return (names & _BOOKKEEPING) | of_datasets | caches


def _raise(error: OSError) -> None:
    raise error


def name(paths: Sequence[Path]) -> list[File]:
    """Give each file its number and its short name.

    The short name is the file's own name. Where several files have the same name, it is the path below the
    folder that these files have in common.
    """
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
    """Total size of the files on the disk. Raises OSError for one that cannot be read, as `about` does."""
    total = 0
    for file in files:
        total += about(file.path).st_size
        if not os.access(file.path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.path))
    return total


def about(path: Path) -> os.stat_result:
    """What the system knows of a file.

    Raises OSError if it is not there, ValueError for a pipe or a device, which would be read for ever.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a file. Expected a file of text. Take it out of the corpus.")
    return found


def printable(name: str | Path) -> str:
    """A file name as valid UTF-8. File systems also allow names that are not."""
    return os.fsencode(name).decode("utf-8", "replace")
