"""How the rules after `shard` read the shards: one entry of the manifest at a time, and all of it verified.

An entry of the manifest holds the identities of the shard's tokens and of each column of its Parquet file. So
a rule verifies exactly what it reads. The manifest holds an identity for all training shards and one for all
held-out shards, too. These are what later rules are made from: new held-out text changes no training text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.corpus import token_files

Entry = dict[str, Any]
LABEL = "label"  # the column of the documents' labels (corpus.label_field), if they have any
N_LABELLED = "n_labelled"  # of an entry: documents that have a label


def entries(path: Path, manifest: dict[str, Any], split: str) -> list[Entry]:
    """The manifest's entries of `train` or `eval` shards, in order.

    Raises ValueError if they hold no document.
    """
    found = [s for s in manifest["shards"] if s["split"] == split]
    if not any(s["n_documents"] for s in found):
        raise ValueError(
            f"{path}: no {split} documents. Expected at least one. "
            f"Check corpus.{split} and corpus.eval_fraction."
        )
    return found


def documents(folder: Path, entry: Entry) -> token_files.Documents:
    """The token ids of a shard. Raises ValueError unless they have the identity that the manifest gives."""
    return token_files.read(folder / f"{entry['name']}.arrow", 0, entry["identity_groups"][0])


def attributes(folder: Path, entry: Entry, columns: list[str]) -> pa.Table:
    """Columns of a shard's Parquet file, with the rows in the order of its token file.

    Raises ValueError for a column that is missing or not the one that the manifest speaks of.
    """
    return pa.concat_tables(batches(folder, entry, columns, 1 << 16))


def batches(folder: Path, entry: Entry, columns: list[str], n_rows: int) -> Iterator[pa.Table]:
    """The same as `attributes`, up to `n_rows` rows at a time. The error comes after the last batch."""
    path = folder / f"{entry['name']}.parquet"
    hashes = {name: ColumnHash() for name in columns}
    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas, which takes half a second
            schema = pa.schema([file.schema_arrow.field(name) for name in columns])
            yield pa.Table.from_batches([], schema)
            for batch in file.iter_batches(n_rows, columns=columns):
                table = pa.Table.from_batches([batch]).select(columns)
                for name in columns:
                    hashes[name].add(table[name])
                yield table
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"{path}: unreadable ({error}). Expected the columns {', '.join(columns)}. {_again(path)}"
        ) from error
    for name in columns:
        if hashes[name].hexdigest() != entry["identity_columns"][name]:
            raise ValueError(
                f"{path}: its column {name} is not the one that its manifest speaks of. "
                f"Expected identity {entry['identity_columns'][name]}. {_again(path)}"
            )


class ColumnHash:
    """Hash of a column of strings or numbers. It does not depend on how the rows are cut into chunks."""

    def __init__(self) -> None:
        self._lengths, self._values = artifact.new_hash(), artifact.new_hash()

    def add(self, column: pa.ChunkedArray) -> None:
        """Take the next rows. Raises ValueError for a null."""
        for chunk in column.chunks:
            if chunk.null_count:
                raise ValueError("a null")
            if pa.types.is_string(chunk.type):
                offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
                self._lengths.update(np.diff(offsets).data)
                if len(chunk):
                    self._values.update(chunk.buffers()[2].slice(offsets[0], offsets[-1] - offsets[0]))
            else:
                self._values.update(np.ascontiguousarray(chunk.to_numpy()).data)

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        digest = self._lengths.copy()
        digest.update(self._values.digest())
        return digest.hexdigest()


def _again(path: Path) -> str:
    return make_again(path.with_name("manifest.json"))


def tokenizer(path: Path, shards: Path) -> Tokenizer:
    """Load tokenizer.json. Raises ValueError unless the shards were made with it."""
    artifact.check_made_from(
        shards, artifact.read_sealed(shards, "shards"), "tokenizer", artifact.identity(path)
    )
    return Tokenizer.from_file(str(path))


def identity_of(entries: list[Entry], about: dict[str, Any]) -> str:
    """Identity of the documents of some entries. `about`: what else decides what their tokens mean.

    Labels are no part of it: most rules do not read them.
    """
    return artifact.fingerprint({"entries": [_without_labels(entry) for entry in entries], **about})


def _without_labels(entry: Entry) -> Entry:
    kept = {key: value for key, value in entry.items() if key != N_LABELLED}
    columns = entry.get("identity_columns", {})
    if LABEL in columns:
        kept["identity_columns"] = {name: value for name, value in columns.items() if name != LABEL}
    return kept


def identity_labels(entries: list[Entry]) -> str | None:
    """Identity of the labels of some entries. None if labels were not read."""
    columns = [entry.get("identity_columns", {}).get(LABEL) for entry in entries]
    return None if None in columns else artifact.fingerprint(columns)


def labels(folder: Path, entry: Entry) -> list[str]:
    """The label of each document of a shard, "" where it has none.

    Raises ValueError for labels that are not those of the manifest.
    """
    return attributes(folder, entry, [LABEL])[LABEL].to_pylist()


def sample(train: list[Entry], n: int, rng_seed: int) -> Iterator[tuple[Entry, np.ndarray]]:
    """Draw n documents at random over all shards, or all if there are fewer.

    Yields the entry of every shard and its drawn rows, ascending.
    """
    starts = np.cumsum([0] + [entry["n_documents"] for entry in train])
    n_documents = int(starts[-1])
    drawn = np.sort(np.random.default_rng(rng_seed).choice(n_documents, min(n, n_documents), replace=False))
    for entry, start, stop in zip(train, starts[:-1], starts[1:], strict=True):
        first, last = np.searchsorted(drawn, [start, stop])
        yield entry, drawn[first:last] - start
