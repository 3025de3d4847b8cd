"""What runs have written, which is no text of a corpus: an outdir may lie in a folder of the corpus.

Imports nothing heavy, because the workflow uses it too.
"""

from pathlib import Path

PLANNED = ".corpus-files.json"  # in an outdir: the files that a start has found
SEEN = ".corpus.json"  # in an outdir: the identities of corpus files, remembered
# What a run or a study writes at the top of its outdir. What else lies there may be the user's.
NAMES = frozenset(
    (
        *("added", "assignments", "cluster", "config.json", "demo", "embed", "ensemble", "eval", "experts"),
        *("kept", "logs", "random", "report.html", "route", "scored", "scores", "second", "shards"),
        *("slurm", "tokenizer", "work", "runs", "study.html", "study.json", "study.parquet", "study.txt"),
    )
)
DEMO = "demo"  # of these names, the one with text to train on: a run may name it as its corpus


class Outputs:
    """Tells what runs have written: this one, whose outdir is `outdir`, and others by what each leaves there.

    `outdir` need not exist yet. It is None where no run is under way.
    """

    def __init__(self, outdir: Path | None):
        self.outdir = None if outdir is None else outdir.resolve()
        self._known: dict[Path, Path | None] = {}
        self._folders: dict[Path, Path] = {}  # resolved, once for all files in one

    def written_by(self, path: Path) -> Path | None:
        """The outdir of the run that has written a file or folder, or the folder it lies in; else None."""
        if (folder := path.parent) not in self._folders:
            self._folders[folder] = folder.resolve()
        return self._find(self._folders[folder] / path.name)

    def _find(self, path: Path) -> Path | None:
        if path.parent == path:
            return None
        if path not in self._known:
            found = self._find(path.parent)
            if found is None and path.name in NAMES and self._is_outdir(path.parent):
                found = path.parent
            self._known[path] = found
        return self._known[path]

    def _is_outdir(self, folder: Path) -> bool:
        return folder == self.outdir or any((folder / mark).exists() for mark in (PLANNED, SEEN))

    def refuse_own(self, pattern: str, root: Path) -> None:
        """Raise ValueError for a pattern that names, at `root`, what this run writes."""
        outdir = self.written_by(root)
        if outdir is None or outdir != self.outdir or (outdir / DEMO) in root.resolve().parents:
            return
        raise ValueError(
            f"{pattern}: among the outputs of this run, whose outdir is {outdir}. Expected text from "
            "elsewhere. Correct corpus.train or corpus.eval, or change outdir."
        )
