"""The identity of a corpus: what its files hold, whatever their paths and times.

A file's identity is the hash of its bytes. It is remembered with the file's path, size, inode and times, so
that a start of the workflow reads only files that look changed. Imports nothing heavy, because the workflow
uses it, too.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import run_folders

PLANNED = run_folders.PLANNED  # in the folder of the outputs: the files that a start has found
SEEN = run_folders.SEEN  # in the folder of the outputs: the identities of corpus files, remembered
_THREADS = 4  # one thread hashes about 1 GB/s
_SETTLED_NS = 3_000_000_000  # file systems count time in steps of up to two seconds
_CTIME = 2  # index of the time of change, which nobody can set, in what is remembered of a file
_KIND, _PLANNED_KIND = "seen", "corpus_files"


def of_corpus(
    train: Iterable[str],
    held_out: Iterable[str] | None,
    demo: Path | None,
    seen: Path,
    remember: bool = True,
) -> str:
    """The identity of training and held-out text, as `shard` reads them.

    Without `remember`, the file `seen` is only read.
    It depends on the order of the files and on their short names, which may be part of documents' ids.
    """
    files = {
        "train": corpus_files.input_files(train, demo, seen.parent),
        "eval": corpus_files.input_files(held_out or [], demo, seen.parent),
    }
    named = corpus_files.name([*files["eval"], *files["train"]])
    hashes = _identities([file.path for file in named], seen, remember)
    rows = [[file.name, file_hash] for file, file_hash in zip(named, hashes, strict=True)]
    return artifact.fingerprint({"rows": rows, "n_held_out": len(files["eval"])})


def of_training_text(train: Iterable[str], demo: Path | None, seen: Path) -> str:
    """The identity of the training text, as `tokenizer` reads it: the order of the files has no effect."""
    return artifact.fingerprint(sorted(_identities(corpus_files.input_files(train, demo, seen.parent), seen)))


def write_planned(files: Iterable[str], path: Path) -> None:
    """Remember the files of a corpus that a start has found, for `check_planned`."""
    names = [_name(Path(file)) for file in files if file != corpus_files.DEMO]
    artifact.write_sealed(path, artifact.make_meta(_PLANNED_KIND, {}, files=names))


def check_planned(path: Path | None, found: Iterable[Path]) -> None:
    """Raise ValueError if a file that the start of the run has found, as `path` says, is not there any more.

    Files that have come since are no fault: the record of a rule says what was read.
    """
    if path is None:
        return
    names = {_name(file) for file in found}
    gone = [name for name in artifact.read_sealed(path, _PLANNED_KIND)["files"] if name not in names]
    if gone:
        more = f", and {len(gone) - 1} more files are gone" if len(gone) > 1 else ""
        raise ValueError(
            f"{gone[0]}: gone since the run was started{more}. Expected the corpus to stay as it is. Bring "
            "it back and start again, or start again to run without it."
        )


def _name(path: Path) -> str:
    """The absolute path of a file as text, also where its bytes are no UTF-8."""
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def _identities(paths: Sequence[Path], seen: Path, remember: bool = True) -> list[str]:
    """The hash of each file. `seen` is the file that remembers them; it need not exist.

    A file that has changed a moment ago is not remembered: it may change again without another time.
    """
    known = _read(seen)
    names = [_name(path) for path in paths]
    stats = [_stat(path) for path in paths]
    settled = time.time_ns() - _SETTLED_NS
    new = {
        name: (path, stat)
        for name, path, stat in zip(names, paths, stats, strict=True)
        if known.get(name, [None])[:-1] != stat
    }
    if new:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(artifact.identity, [path for path, _ in new.values()])
            for (name, (_, stat)), file_hash in zip(new.items(), found, strict=True):
                known[name] = [*stat, file_hash]
        # a dry run makes no folder; in a folder that is not ours, the next start hashes again
        with contextlib.suppress(OSError):
            if remember and seen.parent.is_dir():
                old = {name: entry for name, entry in known.items() if entry[_CTIME] < settled}
                artifact.write_sealed(seen, artifact.make_meta(_KIND, {}, files=old))
    return [known[name][-1] for name in names]


def _stat(path: Path) -> list[int]:
    """Size, times and inode of a file. Raises OSError if it is not there, ValueError if it is no file."""
    about = corpus_files.about(path)
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _read(seen: Path) -> dict[str, list[Any]]:
    """What is remembered: by path, what `_stat` said, and the hash. Nothing if the file is not whole."""
    try:
        return artifact.read_sealed(seen, _KIND)["files"]
    except (OSError, ValueError):
        return {}
