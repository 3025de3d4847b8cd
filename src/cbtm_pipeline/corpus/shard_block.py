"""What the workers of rule `shard` do: parse, check, split, tokenise and write one block of raw records."""

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import encoding, repeated_ids, shard_files, token_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.records import Fields, Part
from cbtm_pipeline.corpus.rows import BadRow, Document

SPILL = ".spill"  # folder of the files that are needed only until the manifest is written
HELD_OUT = "held-out.npy"  # in this folder: sorted hashes of the held-out texts, if corpus.eval gives them
SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("text", pa.string()), ("n_tokens", pa.int32()), ("n_bytes", pa.int64())]
)
# Slices of each kind, and their size. The reference takes as long for them as gigatoken for a hundred times
# the text.
_N_SLICES, _SLICE_BYTES = 16, 512
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_ROW_GROUP_BYTES = 1 << 23

Entry = dict[str, Any]  # a shard's entry in the manifest
Split = Literal["train", "eval", "both"]


class Setup(NamedTuple):
    """What all blocks have in common."""

    folder: Path
    tokenizer_json: Path
    identity: str  # of tokenizer_json
    separator_id: int
    vocab_size: int
    fields: Fields
    eval_fraction: float

    @property
    def schema(self) -> pa.Schema:
        """The columns of a shard. There is one for labels if these are read."""
        label = pa.field(shard_files.LABEL, pa.string())
        return SCHEMA if self.fields.label is None else SCHEMA.insert(1, label)


class Block(NamedTuple):
    """Records that become one shard of training documents (`train`) or of held-out documents (`eval`).

    With `both`, they become one shard of each, split by a hash of the text.
    """

    number: int
    split: Split
    parts: list[Part]


class Made(NamedTuple):
    """What one block gave."""

    shards: list[Entry]
    bad: list[BadRow]
    held_out: np.ndarray  # hashes of the texts, for the blocks of corpus.eval
    n_read: int  # bytes of the corpus files
    n_bytes: int  # of all records
    n_sampled: int  # slices of texts on which gigatoken was compared with the reference
    why_slow: str  # why the reference encoded the block; "" if gigatoken did


def make(setup: Setup, block: Block) -> Made:
    """Write the shards of a block, and a list of their ids in the folder SPILL. Takes the parts out of the
    block.

    A shard without documents is not written.
    """
    n_read = sum(part.n_read for part in block.parts)
    n_bytes = sum(sum(corpus_rows.n_bytes(part)) for part in block.parts)
    documents, bad = _parse(setup, block.parts)
    hashes = [corpus_rows.text_hash(document.text) for document in documents]
    in_held_out = _among(hashes, setup.folder / SPILL / HELD_OUT if block.split == "train" else None)

    encoder = _encoder(setup.tokenizer_json, setup.identity)
    sample = _sample([document.text for document in documents])
    why_slow = encoder.why_slow
    if not why_slow and not encoder.agrees(sample):
        why_slow = "gigatoken encodes the sample differently"
    ids = [encoder.encode(document.text, not why_slow) for document in documents]

    rows: dict[str, list[int]] = {"train": [], "eval": []}
    for i, document in enumerate(documents):
        reason = ""
        if in_held_out[i]:
            reason = "held-out text: a document of corpus.eval has exactly this text"
        elif not len(ids[i]):
            reason = corpus_rows.NO_TOKENS
        elif block.split == "both":
            rows["eval" if corpus_rows.uniform(hashes[i]) < setup.eval_fraction else "train"].append(i)
        else:
            rows[block.split].append(i)
        if reason:
            bad.append(BadRow(document.file, document.line, reason))

    shards = [
        _write_documents(
            setup, f"{split}-{block.number:05d}", [documents[i] for i in taken], [ids[i] for i in taken]
        )
        for split, taken in rows.items()
        if taken
    ]
    held_out = np.array(hashes if block.split == "eval" else [], "S16")
    return Made(shards, sorted(bad), held_out, n_read, n_bytes, len(sample), why_slow)


def _parse(setup: Setup, parts: list[Part]) -> tuple[list[Document], list[BadRow]]:
    """Parse the parts and remove each from the list, so that memory never holds all records twice."""
    documents: list[Document] = []
    bad: list[BadRow] = []
    parts.reverse()
    while parts:
        for row in corpus_rows.read(parts.pop(), setup.fields):
            if isinstance(row, Document):
                documents.append(row)
            else:
                bad.append(row)
    return documents, bad


def spilled(setup: Setup, name: str) -> Path:
    """The file that lists the ids of a shard."""
    return setup.folder / SPILL / f"{name}.npy"


def _among(hashes: list[bytes], path: Path | None) -> np.ndarray:
    """Which of the hashes are in the sorted array at `path`; none if there is no such file."""
    known = np.zeros(len(hashes), bool)
    if (
        path is not None
        and path.exists()
        and len(held_out := np.load(path, mmap_mode="r", allow_pickle=False))
    ):
        wanted = np.array(hashes, "S16")
        known = held_out[np.minimum(np.searchsorted(held_out, wanted), len(held_out) - 1)] == wanted
    return known


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_json: Path, identity: str) -> encoding.TokenEncoder:
    return encoding.TokenEncoder(tokenizer_json)


def _sample(texts: list[bytes]) -> list[bytes]:
    """Slices of the texts, on which gigatoken is compared with the reference.

    Half of them are spread evenly over all bytes. The others lie around the first non-ASCII character of
    texts that have one, because encoders differ there; these texts are spread evenly over all such texts.
    """
    if not texts:
        return []
    ends = np.cumsum([len(text) for text in texts])
    at = np.linspace(0, ends[-1], _N_SLICES, endpoint=False).astype(int)
    chosen = np.searchsorted(ends, at, side="right")
    places = [(texts[i], x - int(ends[i]) + len(texts[i])) for i, x in zip(chosen, at.tolist(), strict=True)]
    others = [text for text in texts if not text.isascii()]
    for i in range(0, len(others), -(-len(others) // _N_SLICES) or 1):
        found = _NOT_ASCII.search(others[i])
        assert found
        places.append((others[i], found.start() - _SLICE_BYTES // 4))
    return list(dict.fromkeys(_slice(text, place) for text, place in places))


def _slice(text: bytes, start: int) -> bytes:
    """Up to _SLICE_BYTES of whole characters, from about `start` on."""
    start = max(0, min(start, len(text) - _SLICE_BYTES))
    return text[start : start + _SLICE_BYTES].decode("utf-8", "ignore").encode()


def _write_documents(setup: Setup, name: str, documents: list[Document], ids: list[np.ndarray]) -> Entry:
    """Write a shard and the list of its ids."""
    joined = _joined(ids, setup.separator_id, token_files.dtype_for(setup.vocab_size))
    entry = _write(setup, name, _tables(documents, ids, setup.schema), joined)
    repeated_ids.write(
        spilled(setup, name),
        [document.id for document in documents],
        [document.file for document in documents],
        [document.line for document in documents],
    )
    return entry


def _joined(
    ids: list[np.ndarray], separator_id: int, dtype: type[np.unsignedinteger]
) -> token_files.Documents:
    """The documents as a token file stores them, each with the separator in front."""
    separator = np.array([separator_id], dtype)
    offsets = np.cumsum([0, *(1 + len(x) for x in ids)])
    return token_files.Documents(
        np.concatenate([part for x in ids for part in (separator, x)], dtype=dtype), offsets
    )


def _tables(documents: list[Document], ids: list[np.ndarray], schema: pa.Schema) -> Iterator[pa.Table]:
    """The documents' columns, one table per row group."""
    start = 0
    while start < len(documents):
        stop, n_bytes = start, 0
        while stop < len(documents) and n_bytes < _ROW_GROUP_BYTES:
            n_bytes += len(documents[stop].text)
            stop += 1
        some = documents[start:stop]
        text = pa.array([d.text for d in some], pa.binary()).cast(pa.string())
        columns = {"doc_id": [d.id for d in some], shard_files.LABEL: [d.label for d in some], "text": text}
        columns |= {"n_tokens": [len(x) for x in ids[start:stop]], "n_bytes": [len(d.text) for d in some]}
        arrays = ((columns[field.name], field.type) for field in schema)
        yield pa.table([pa.array(c, t) if isinstance(c, list) else c for c, t in arrays], schema=schema)
        start = stop


def _write(setup: Setup, name: str, tables: Iterable[pa.Table], documents: token_files.Documents) -> Entry:
    """Write the two files of a shard; returns its entry."""
    made_from = {"tokenizer": setup.identity}
    schema = setup.schema.with_metadata(
        {"cbtm": json.dumps(artifact.make_meta("documents", made_from), sort_keys=True)}
    )
    n_bytes, n_labelled, has_labels = 0, 0, setup.fields.label is not None
    hashes = {column: shard_files.ColumnHash() for column in schema.names}
    with (
        artifact.publish(setup.folder / f"{name}.parquet") as tmp,
        pq.ParquetWriter(
            tmp, schema, compression="lz4", use_dictionary=False, write_page_checksum=True
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            n_bytes += sum(table["n_bytes"].to_pylist())
            n_labelled += sum(map(bool, table[shard_files.LABEL].to_pylist())) if has_labels else 0
            for column, digest in hashes.items():
                digest.add(table[column])
    path = setup.folder / f"{name}.arrow"
    identities = token_files.write(path, artifact.make_meta("tokens", made_from), [documents])
    return {
        "name": name,
        "split": name.partition("-")[0],
        "n_documents": len(documents),
        "n_tokens": int(documents.n_tokens.sum()),
        "n_bytes": n_bytes,
        "identity_groups": identities,
        "identity_columns": {column: digest.hexdigest() for column, digest in hashes.items()},
        **({shard_files.N_LABELLED: n_labelled} if has_labels else {}),
    }


class Dropped(NamedTuple):
    """A shard from which rows were removed."""

    entry: Entry | None  # its new entry; None if no row is left
    ids: list[str]  # of the removed rows


def drop(setup: Setup, work: tuple[Entry, np.ndarray]) -> Dropped:
    """Write a shard again without some of its rows. `work`: its entry, and these rows in ascending order.

    If no row is left, the files of the shard are removed.
    """
    entry, rows = work
    paths = [setup.folder / f"{entry['name']}{suffix}" for suffix in (".parquet", ".arrow")]
    keep = np.ones(entry["n_documents"], bool)
    keep[rows] = False
    with pq.ParquetFile(paths[0], page_checksum_verification=True) as file:
        ids = file.read(["doc_id"])["doc_id"].take(pa.array(rows)).to_pylist()
        if keep.any():
            kept = token_files.read(paths[1], 0, entry["identity_groups"][0]).take(np.flatnonzero(keep))
            return Dropped(_write(setup, entry["name"], _filtered(file, keep), kept), ids)
    for path in paths:
        path.unlink()
    return Dropped(None, ids)


def _filtered(file: pq.ParquetFile, keep: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for i in range(file.num_row_groups):
        table = file.read_row_group(i)
        yield table.filter(pa.array(keep[start : start + len(table)]))
        start += len(table)
