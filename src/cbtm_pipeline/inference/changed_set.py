"""An ensemble with another set of experts: a new folder, beside the one that it comes from.

No expert is trained, and no file of the experts that stay changes: they are hard links where the file system
has them. The router's settings stay. Each expert has a centre of its own, so a set changes by a row.

Shapes: K experts, D dimensions, V terms.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save

from cbtm_pipeline import config as run_config
from cbtm_pipeline import config_values
from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.publish import fresh, publish
from cbtm_pipeline.clustering import words
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.inference import model_card, package
from cbtm_pipeline.provenance import made_from

ROUTER, README = "router.safetensors", "README.md"
CARD = "card.json"
WRITTEN = (package.CONFIG, package.TERMS, package.CODE, ROUTER, README)  # anew; all else is as it was
N_TERMS = 12

Record = dict[str, Any]


class Set(NamedTuple):
    """The experts of an ensemble's folder, in the order of the rows of `centres_KD` and of `terms`."""

    folder: Path
    record: Record
    config: Record
    names: list[str]
    embedding_VD: np.ndarray
    centres_KD: np.ndarray
    terms: list[list[str]]
    tags: dict[str, dict[str, str]]

    def row(self, name: str) -> int:
        """The number of an expert. Raises ValueError if there is none of this name."""
        if name not in self.names:
            raise ValueError(
                f"{name}: no expert of {self.folder}. Expected one of {', '.join(self.names)}. Name one."
            )
        return self.names.index(name)


class Change(NamedTuple):
    """What is done to a set. `new`: an expert's name and the folder that it comes from."""

    what: str  # in one sentence, for the model card
    about: Mapping[str, Any]  # for the record
    new: tuple[str, Path] | None = None


def read(folder: Path) -> Set:
    """The set of a folder. What is read is verified. Raises ValueError for a folder that is no ensemble."""
    record = package.read_record(folder)
    for name in (package.CONFIG, package.TERMS, ROUTER):
        if name in record["files"]:
            package.check_file(folder, record, name)
    config, tensors = artifact.read_json(folder / package.CONFIG), load_file(folder / ROUTER)
    names, terms = list(config["experts"]), [[] for _ in config["experts"]]
    if package.TERMS in record["files"]:
        terms = artifact.read_sealed(folder / package.TERMS, "top_terms")["top_terms"]
    tags = {name: dict(own) for name, own in config.get("tags", {}).items()}
    return Set(folder, record, config, names, tensors["embedding"], tensors["centres"], terms, tags)


def of_run(outdir: Path, folder: Path) -> tuple[run_config.Config, Set]:
    """The config of a run, and the set of an ensemble of it.

    Raises ValueError if they do not belong together.
    """
    path = outdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected that of a finished run. Name its --outdir.")
    cfg, found = run_config.read(path), read(folder)
    if encoding.read_card(outdir / "tokenizer/tokenizer.json")["identity"] != tokenizer_of(found):
        raise ValueError(
            f"{folder}: another tokenizer than that of {outdir}. Expected an ensemble of this run. Name its "
            "--outdir."
        )
    return cfg, found


def check_new_name(name: str, taken: list[str]) -> None:
    """Raise ValueError for a name that an added expert cannot have."""
    if name in taken:
        raise ValueError(f"{name}: an expert has this name. Expected a new one. Choose another.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name):
        expected = "a letter, then letters, digits, - or _, 64 at most"
        raise ValueError(f"{name!r}: no name for an expert. Expected {expected}. Choose another.")
    from torch.nn import ModuleDict  # takes a second; the model keeps its experts in one

    if hasattr(ModuleDict(), name):
        raise ValueError(f"{name}: a word that torch uses itself. Expected another name. Choose another.")


def read_tags(given: list[str]) -> dict[str, str]:
    """Tags of a command line, `key=value` each. Raises ValueError for one that is none."""
    tags = {}
    for tag in given:
        key, equals, value = tag.partition("=")
        if not equals or not re.fullmatch(config_values.TAG_KEY, key) or not value.strip():
            raise ValueError(f"--tag: {tag!r}. Expected key=value, such as licence=cc-by. Correct it.")
        if key == config_values.OF_EXPERTS:
            raise ValueError(f"--tag: {tag!r}. Expected another key: this one is taken. Choose one.")
        if tags.get(key, value) != value:
            found = f"{key}={tags[key]} and {key}={value}"
            raise ValueError(f"--tag: {found}. Expected one value for a key. Leave one out.")
        tags[key] = value
    return tags


def top_terms(
    tokenizer_json: Path, found: Set, counts_V: np.ndarray, centre_D: np.ndarray, texts: Iterable[str]
) -> list[str]:
    """The words of documents with these term counts that draw most towards their centre, off the others.

    A term that is the share f of all tokens counts f E_v (c - mean of the centres). A term that is a part of
    a word stands for the most frequent such word of `texts`, which are some of the documents.
    """
    from tokenizers import Tokenizer

    pull_V = found.embedding_VD @ (centre_D - found.centres_KD.mean(axis=0))
    value_V = pull_V * counts_V / max(counts_V.sum(), 1)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    order = np.argsort(-value_V, kind="stable")[: int((value_V > 0).sum())].tolist()
    found_words = dict.fromkeys(tokenizer.decode([v]).strip().casefold() for v in order)
    readable = [word for word in found_words if len(word) > 1 and "\ufffd" not in word]
    # the sort is stable: words of three letters or more come first, as in a run's own terms
    ranked = sorted(readable, key=lambda word: not (len(word) > 2 and word.isalpha()))
    return words.completed(ranked[: 4 * N_TERMS], texts)[:N_TERMS]


def write(found: Set, change: Change, out: Path, card: Record | None = None) -> Record:
    """Write the folder of a changed set, which is there whole or not at all. Returns its record.

    `found` has the new names, centres, terms and tags, and the folder and record of the old set. `card` is
    for a new expert that has none. Raises ValueError if `out` is not empty.
    """
    package.check_new(out, found.folder)
    out = Path(os.path.realpath(out))  # `.` has no name, and a link stands for the folder that it leads to
    name = f".{out.name}.{os.getpid()}.tmp"
    staging = out / name if out.is_dir() else out.with_name(name)
    fresh(staging)
    try:
        record = _write(found, change, staging, card)
        if out.is_dir():  # it may be somebody's current folder, so it stays; the record comes last
            for path in sorted(staging.iterdir(), key=lambda path: path.name == package.FILES):
                path.rename(out / path.name)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            staging.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _write(found: Set, change: Change, to: Path, card: Record | None) -> Record:
    hashes = dict(_place_kept(found, change, to))
    if change.new:
        name, folder = change.new
        for file in package.EXPERT_FILES:
            if (folder / file).exists():
                package.place(folder / file, to / "experts" / name / file, link=True)
        if card and not (folder / CARD).exists():
            artifact.write_sealed(to / "experts" / name / CARD, card)
    config = {**found.config, "experts": found.names, "exclude": [], "tags": found.tags}
    if n_active := config.get("n_active"):
        config["n_active"] = n_active = min(n_active, len(found.names))
    artifact.write_json(to / package.CONFIG, config)
    origin = {"ensemble": found.record["seal"]}
    about = artifact.make_meta("top_terms", origin, top_terms=found.terms)
    artifact.write_sealed(to / package.TERMS, about)
    with publish(to / ROUTER) as tmp:
        tensors = {"embedding": found.embedding_VD, "centres": found.centres_KD}
        tmp.write_bytes(save({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}))
    with publish(to / package.CODE) as tmp:
        tmp.write_text(package.code(), "utf-8")
    cards = {name: read_card(to / "experts" / name) for name in found.names}
    before = (found.folder / README).read_text("utf-8")
    with publish(to / README) as tmp:
        text = model_card.changed(before, cards, found.terms, found.tags, change.what, n_active)
        tmp.write_text(text, "utf-8")
    files = {str(path.relative_to(to)): path for path in package.files(to)}
    hashes = {name: hashes.get(name) or artifact.identity(path) for name, path in files.items()}
    origin |= {"tokenizer": tokenizer_of(found)}
    origin |= {f"expert-{name}": card["identity"] for name, card in cards.items() if "identity" in card}
    changes = [*found.record.get("changes", []), {**change.about, "from": found.record["seal"]}]
    about = {"files": hashes, "computes": made_from.computes(config, hashes)}
    meta = artifact.make_meta("ensemble", origin, changes=changes, **about)
    return {**meta, "seal": artifact.write_sealed(to / package.FILES, meta)}


def _place_kept(found: Set, change: Change, to: Path) -> Mapping[str, str]:
    """Link what stays. Returns the hashes, which are those of the old record.

    A link is not read: damage of a file shows where its ensemble is loaded, there as here.
    """
    new = change.new[0] if change.new else None
    kept = {}
    for name, expected in found.record["files"].items():
        folder, _, rest = name.partition("/")
        expert = rest.partition("/")[0] if folder == "experts" else None
        if name in WRITTEN or (expert is not None and (expert == new or expert not in found.names)):
            continue
        package.check_there(found.folder, name)
        package.place(found.folder / name, to / name, link=True)
        kept[name] = expected
    return kept


def read_card(folder: Path) -> Record:
    """The card of an expert; empty if it has none."""
    path = folder / CARD
    return artifact.read_sealed(path, "expert") if path.exists() else {}


def tokenizer_of(found: Set) -> str:
    """The identity of the ensemble's tokenizer."""
    package.check_file(found.folder, found.record, "tokenizer.json")
    return artifact.identity(found.folder / "tokenizer.json")
