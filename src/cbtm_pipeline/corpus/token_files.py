"""Token files: the documents of a shard as token ids, memory-mapped, one Arrow record batch per group.

A shard of rule `shard` has one group. Rule `assign` writes the same documents again as k groups, one per
cluster. So expert i maps batch i of every file and reads no bytes of another cluster.

A document is stored as its separator token followed by its own tokens: `[sep, x_0, ..., x_(n-1)]`. So the
concatenated documents are a stream to train on, and every token x, also the first, has a context. `n_tokens`
always counts x alone.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again


class Documents(NamedTuple):
    """Documents as token ids.

    `values`: all tokens of all documents (uint16 or uint32). Document i is
    `values[offsets[i]:offsets[i + 1]]`, with the separator first.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> np.ndarray:
        """The number of tokens of each document, without the separator (int64)."""
        return np.diff(self.offsets) - 1

    @property
    def identity(self) -> str:
        """Content hash of tokens and document lengths."""
        digest = artifact.new_hash()
        digest.update(f"{self.values.dtype} {len(self)}".encode())
        digest.update(np.ascontiguousarray(self.n_tokens, np.int64).data)
        digest.update(np.ascontiguousarray(self.values).data)
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> "Documents":
        """The documents at `rows`, in that order."""
        starts, stops = self.offsets[:-1][rows], self.offsets[1:][rows]
        taken = [self.values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        return Documents(
            np.concatenate([self.values[:0], *taken]), np.concatenate([[0], np.cumsum(stops - starts)])
        )


def join(parts: Sequence[Documents]) -> Documents:
    """Concatenate the documents of all parts."""
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return Documents(np.concatenate([part.values for part in parts]), np.concatenate([*offsets, starts[-1:]]))


def dtype_for(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest token type that holds the vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write(path: str | Path, meta: Mapping[str, Any], groups: Iterable[Documents]) -> list[str]:
    """Write one record batch per group. Returns the identity of each group, which the file holds, too.

    `meta` is the artifact's record, `artifact.make_meta("tokens", ...)`.
    """
    groups = list(groups)
    identities = [group.identity for group in groups]
    meta = {**meta, "identity_groups": identities}
    first = groups[0]
    value_type = pa.from_numpy_dtype(first.values.dtype)
    schema = pa.schema(
        [("tokens", pa.large_list(value_type))], metadata={"cbtm": json.dumps(meta, sort_keys=True)}
    )
    with (
        artifact.publish(path) as tmp,
        pa.OSFile(str(tmp), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        for group in groups:
            column = pa.LargeListArray.from_arrays(
                pa.array(group.offsets, pa.int64()), pa.array(group.values, value_type)
            )
            writer.write_batch(pa.record_batch([column], schema=schema))
    return identities


def read_identities(path: str | Path, expected: str) -> list[str]:
    """The identities of all groups of a file. Raises ValueError unless their fingerprint is `expected`.

    So a manifest with one fingerprint for each file verifies any group, and no reader hashes other groups.
    """
    with _damage_is_an_error(path):
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
        identities = artifact.from_compact(metadata[b"cbtm"])["identity_groups"]
        found = artifact.fingerprint(identities)
    if found != expected:
        raise ValueError(
            f"{path}: not the file that its manifest speaks of ({found}). Expected {expected}. {_again(path)}"
        )
    return identities


def read(path: str | Path, group: int, expected: str) -> Documents:
    """Memory-map group `group` of a token file; no bytes of other groups are read.

    Raises ValueError for a file that is no token file, and for a group whose identity is not `expected`. A
    process computes the identity of a group once.
    """
    about = Path(path).stat()
    with _damage_is_an_error(path):
        documents = read_unverified(path, group)
        found = _identity(str(path), about.st_ino, about.st_size, about.st_mtime_ns, group)
    if found != expected:
        raise ValueError(
            f"{path}: group {group} is not the one that its manifest speaks of ({found}). "
            f"Expected identity {expected}. {_again(path)}"
        )
    return documents


@contextmanager
def _damage_is_an_error(path: str | Path) -> Iterator[None]:
    """Turn the errors of a damaged file, which have many types, into a ValueError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, IndexError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system cannot read the file; pyarrow reports damage as an OSError without number
        raise ValueError(f"{path}: damaged ({error}). Expected a token file. {_again(path)}") from error


def _again(path: str | Path) -> str:
    return make_again(Path(path).with_name("manifest.json"))


@functools.cache
def _identity(path: str, inode: int, n_bytes: int, mtime_ns: int, group: int) -> str:
    """The identity of a group, computed again only if the file's inode, size or time of change is another."""
    return read_unverified(path, group).identity


def read_unverified(path: str | Path, group: int) -> Documents:
    """Memory-map a group whose identity nobody has checked. Raises various errors for a damaged file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(group)
    batch.validate(full=True)
    column = batch.column(0)
    if not isinstance(column, pa.LargeListArray) or column.type.value_type not in (pa.uint16(), pa.uint32()):
        raise ValueError("no lists of tokens")
    if column.null_count or column.values.null_count:
        raise ValueError("no lists of tokens")
    # Arrow's own conversion to NumPy would import pandas, which takes longer than to read a small file.
    offsets, values = np.from_dlpack(column.offsets), np.from_dlpack(column.values)
    if len(values) != offsets[-1] or offsets[0] != 0:
        raise ValueError("no lists of tokens")
    return Documents(values, offsets)
