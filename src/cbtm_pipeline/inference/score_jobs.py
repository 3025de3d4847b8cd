"""Text scored by one job for each expert: what `cbtm score` asks of workflow/scored.smk, and what comes back.

All that is made lies in <outdir>/scored/NAME. Which experts are mixed is no part of the request. So an expert
scores the text once, whatever is excluded later.

Shapes: N tokens of all documents, D documents, K centres.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import changed_set, package
from cbtm_pipeline.ops import snakemake_run
from cbtm_pipeline.provenance import expert_files

SNAKEFILE = "scored.smk"  # in workflow/
FOLDER = "scored"  # in the outdir of the run
NAME_DIGITS = 12


class Counts(NamedTuple):
    """A file of documents. `rows` are its tokens among those of all files.

    `left_out` says which rows are no documents, and why.
    """

    name: str
    rows: slice
    n_documents: int
    n_bytes: int
    left_out: list[str]

    @property
    def n_tokens(self) -> int:
        return self.rows.stop - self.rows.start


class Reading(NamedTuple):
    """How the documents are read: as `cbtm score` is told."""

    context: int
    stride: int
    text_field: str
    txt_documents: str


class Found(NamedTuple):
    """What the jobs have made. `logprob` is by model, (N,) each; the columns of `d2_NK` are `experts`."""

    files: list[Counts]
    logprob: dict[str, np.ndarray]
    d2_NK: np.ndarray
    offsets: np.ndarray
    experts: list[str]


def configured(cfg: config.Config, files: Sequence[Path], how: Reading) -> config.Config:
    """The config of the jobs: that of the run with this text, whole documents and these windows.

    Documents get no id of their own, so `<file>:<row>` says where each comes from. Raises ValueError for what
    no config can hold.
    """
    for path in files:
        if corpus_files.printable(path) != str(path):
            raise ValueError(
                f"{path}: a name that is not UTF-8. Expected one that is, for jobs of their own. Rename it."
            )
    if how.context < 2:
        raise ValueError(f"--context: {how.context}. Expected 2 or more, for jobs of their own. Raise it.")
    values = config.of_new_text(cfg, [str(path.absolute()) for path in files])
    values["corpus"] |= {"id_field": "", "max_bad_share": 1.0}
    values["corpus"] |= {"text_field": how.text_field, "txt_documents": how.txt_documents}
    values["train"] |= {"seq_len": how.context}
    values["eval"] |= {"stride": how.stride, "max_document_tokens": None}
    return config.validate(values)


def request(
    outdir: Path, cfg: config.Config, found: changed_set.Set, baselines: Mapping[str, Path], how: Reading
) -> dict[str, Any]:
    """What is asked for: the text of this config, the models, and the windows.

    `outdir` is that of the run, `baselines` are folders by name.
    """
    folders = {name: found.folder / "experts" / name for name in found.names} | dict(baselines)
    identities = {name: package.expert_identity(found.record, name) for name in found.names}
    identities |= {name: changed_set.read_card(folder)["identity"] for name, folder in baselines.items()}
    corpus = content.of_corpus([], cfg.corpus.train, None, outdir / FOLDER / content.SEEN)
    about = {
        "tokenizer": str(outdir / "tokenizer/tokenizer.json"),
        "ensemble": str(found.folder),
        "weights": {name: str(folder / expert_files.WEIGHTS) for name, folder in folders.items()},
        "experts": found.names,
        "models": identities,
        "held_out": True,
        "windows": how._asdict(),
    }
    made_from = {"corpus": corpus, "ensemble": found.record["seal"]}
    return artifact.make_meta(snakemake_run.KIND, made_from, **about)


def folder(outdir: Path, name: str | None, asked: Mapping[str, Any]) -> Path:
    """Where all of this is made. Without a name, it has that of the request: a hash of what is asked for.

    Raises ValueError for a name that a folder or a job should not have.
    """
    if name is None:
        what = {key: value for key, value in asked.items() if key not in snakemake_run.PLACES}
        name = artifact.fingerprint(what)[:NAME_DIGITS]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        expected = "letters, digits, - or _, 64 at most"
        raise ValueError(f"--name: {name!r}. Expected {expected}. Choose another.")
    return outdir / FOLDER / name


def targets(folder: Path, models: Iterable[str]) -> list[str]:
    """The files that the jobs make for these models, the distances first."""
    return [str(folder / "route/distances.npz"), *(str(folder / f"scores/{name}.npz") for name in models)]


def read(folder: Path, asked: Mapping[str, Any], models: Iterable[str], files: Sequence[Path]) -> Found:
    """What the jobs have made, of these models and files. Raises ValueError for what was not asked for."""
    path = folder / "shards/manifest.json"
    manifest = artifact.read_sealed(path, "shards")
    artifact.check_made_from(path, manifest, "corpus", asked["made_from"]["corpus"])
    held_out = manifest["identity_eval"]
    first, *others = map(Path, targets(folder, models))
    arrays = _read(first, "distances", held_out=held_out, ensemble=asked["made_from"]["ensemble"])
    logprob = {
        path.stem: _read(path, "scores", held_out=held_out, expert=asked["models"][path.stem])["logprob_N"]
        for path in others
    }
    counts = _files(folder, arrays, files)
    return Found(counts, logprob, arrays["d2_NK"], arrays["offsets"], asked["experts"])


def _read(path: Path, kind: str, **made_from: str) -> dict[str, np.ndarray]:
    """The arrays of an npz that was made from this."""
    arrays, meta = artifact.read_npz(path, kind)
    for name, expected in made_from.items():
        artifact.check_made_from(path, meta, name, expected)
    return arrays


def _files(folder: Path, arrays: dict[str, np.ndarray], files: Sequence[Path]) -> list[Counts]:
    """The counts of each file, which the jobs have read in this order, each once."""
    paths = list(dict.fromkeys(path.absolute() for path in files))
    numbers = {file.name: file.number for file in corpus_files.name(paths)}
    file_D = [numbers[doc_id.rpartition(":")[0]] for doc_id in arrays["doc_id"].tolist()]
    begins = np.searchsorted(file_D, range(len(paths) + 1))
    left_out = {str(path): [] for path in paths}
    with (folder / "shards/quarantine.jsonl").open(encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            left_out[row["source"]].append(f"row {row['line']}: {row['reason']}")
    found = []
    for path in files:
        number = paths.index(path.absolute())
        a, b = begins[number : number + 2].tolist()
        rows = slice(*arrays["offsets"][[a, b]].tolist())
        n_bytes = int(arrays["n_bytes"][a:b].sum())
        found.append(Counts(str(path), rows, b - a, n_bytes, left_out[str(path.absolute())]))
    return found
