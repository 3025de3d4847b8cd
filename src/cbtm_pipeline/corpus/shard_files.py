"""How the rules after `shard` read the shards: one entry of the manifest at a time, and each file checked."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import token_files

Entry = dict[str, Any]


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
    """The token ids of a shard.

    Raises ValueError unless the file has the identity that the manifest gives.
    """
    path = folder / f"{entry['name']}.arrow"
    check_file(path, entry["identity_tokens"], "shard")
    return token_files.read(path, 0)


def attributes(folder: Path, entry: Entry, columns: list[str]) -> pa.Table:
    """Columns of a shard's Parquet file, with the rows in the order of its token file.

    Raises ValueError for a file that lacks a column or has another number of rows than the manifest gives.
    """
    path = folder / f"{entry['name']}.parquet"
    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas, which takes half a second
            table = file.read(columns).select(columns)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(
            f"{path}: unreadable ({error}). Expected the columns {', '.join(columns)}. Run shard again."
        ) from error
    if table.num_rows != entry["n_documents"]:
        raise ValueError(
            f"{path}: {table.num_rows} rows. Expected {entry['n_documents']}, as in the manifest. "
            "Run shard again."
        )
    return table


def tokenizer(path: Path, shards: Path) -> Tokenizer:
    """Load tokenizer.json. Raises ValueError unless the shards were made with it."""
    artifact.check_made_from(
        shards, artifact.read_json(shards, "shards"), "tokenizer", artifact.identity(path)
    )
    return Tokenizer.from_file(str(path))


def check_file(path: Path, expected: str, rule: str) -> None:
    """Raise ValueError unless the file has the identity that its manifest gives.

    A process reads each file only once for this.
    """
    about = path.stat()
    if _identity(path, about.st_ino, about.st_size, about.st_mtime_ns) != expected:
        raise ValueError(
            f"{path}: not the file that its manifest speaks of. Expected identity {expected}. "
            f"Run {rule} again."
        )


@functools.cache
def _identity(path: Path, *_: int) -> str:
    """The identity of a file, computed again only if its inode, size or time of change is another."""
    return artifact.identity(path)


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
