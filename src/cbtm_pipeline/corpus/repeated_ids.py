"""Find documents of the whole corpus that share an id, in memory that does not grow with the corpus.

Each shard leaves a file of 28 bytes per document, sorted by the hash of the id. So the documents whose hash
lies in one range are one slice of every such file, and the search goes range by range.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# `file` and `line` say where a document comes from, and so which of two documents comes first.
ENTRY = np.dtype([("hash0", "<u8"), ("hash1", "<u8"), ("line", "<u8"), ("file", "<u4")])
_RANGE = 1 << 20  # documents in one range of the search


def write(path: Path, ids: Sequence[str], files: Sequence[int], lines: Sequence[int]) -> None:
    """Write the entries of a shard's documents; `lines` are the numbers of their rows."""
    entries = np.empty(len(ids), ENTRY)
    hashes = b"".join(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in ids)
    entries["hash0"], entries["hash1"] = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
    entries["file"], entries["line"] = files, lines
    np.save(path, entries[np.argsort(entries["hash0"])])


def find(
    paths: Sequence[Path], range_documents: int = _RANGE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find the documents whose id an earlier document has.

    Yields arrays (shard, entry, first) with one element for each such document: the index of its shard in
    `paths`, its entry, and the entry of the earliest document with this id.
    """
    shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    if not shards:
        return
    n_ranges = 1 + sum(map(len, shards)) // range_documents
    starts = [0] * len(shards)
    for i in range(1, n_ranges + 1):
        # bisect reads a few entries of the mapped file; searchsorted would copy the column
        stops = [
            bisect.bisect_left(entries, i * (1 << 64) // n_ranges, key=lambda entry: int(entry["hash0"]))
            for entries in shards
        ]
        found = np.concatenate(
            [np.empty(0, ENTRY), *(s[a:b] for s, a, b in zip(shards, starts, stops, strict=True))]
        )
        shard = np.repeat(np.arange(len(shards)), np.subtract(stops, starts))
        starts = stops
        by_id = np.lexsort((found["line"], found["file"], found["hash1"], found["hash0"]))
        found, shard = found[by_id], shard[by_id]
        again = np.zeros(len(found), bool)
        again[1:] = (found["hash0"][1:] == found["hash0"][:-1]) & (found["hash1"][1:] == found["hash1"][:-1])
        if again.any():
            first = np.maximum.accumulate(np.where(again, 0, np.arange(len(found))))
            yield shard[again], found[again], found[first[again]]


def rows_of(path: Path, entries: np.ndarray) -> np.ndarray:
    """The rows of these entries in their shard, whose entries are in the file `path`.

    The documents of a shard are in the order of the corpus.
    """
    of_shard = np.load(path, allow_pickle=False)
    positions = np.sort(of_shard[["file", "line"]], order=["file", "line"])
    return np.searchsorted(positions, entries[["file", "line"]].astype(positions.dtype))
