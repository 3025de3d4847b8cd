"""One block of raw records made into shards: parsed, validated, split, tokenised, written. This is what the workers of rule `shard` do."""

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
from cbtm_pipeline.corpus import encoding, repeated_ids, token_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.blocks import Part
from cbtm_pipeline.corpus.rows import BadRow, Document

SPILL = ".spill"  # folder of what is needed only until the manifest is written
HELD_OUT = "held-out.npy"  # in it: sorted hashes of the held-out texts, where corpus.eval gives them
SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("text", pa.string()), ("n_tokens", pa.int32()), ("n_bytes", pa.int64())]
)
_N_SLICES, _SLICE_BYTES = (
    16,
    512,
)  # of each kind; the reference needs as long for them as gigatoken for a hundred times the text
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_ROW_GROUP_BYTES = 1 << 23

Entry = dict[str, Any]  # what the manifest says about a shard
Split = Literal["train", "eval", "both"]


class Setup(NamedTuple):
    """What every block is made with."""

    folder: Path
    tokenizer_json: Path
    identity: str  # of tokenizer_json
    separator_id: int
    vocab_size: int
    text_field: str
    id_field: str
    eval_fraction: float


class Block(NamedTuple):
    """Records that become one shard: of training documents, of held-out ones, or (`both`) one of each, split by a hash of the text."""

    number: int
    split: Split
    parts: list[Part]


class Made(NamedTuple):
    """What came of a block."""

    shards: list[Entry]
    bad: list[BadRow]
    held_out: np.ndarray  # hashes of the texts, for the blocks of corpus.eval
    n_read: int  # bytes of the corpus files
    n_sampled: int  # slices of texts on which gigatoken was compared with the reference
    why_slow: str  # why the reference encoded the block; "" if gigatoken did


def make(setup: Setup, block: Block) -> Made:
    """Make the block's shards, and in the folder SPILL a list of their ids. A shard without documents is not written."""
    n_read = sum(part.n_read for part in block.parts)
    documents: list[Document] = []
    bad: list[BadRow] = []
    block.parts.reverse()
    while block.parts:  # so that raw and parsed records are not held together
        for row in corpus_rows.read(block.parts.pop(), setup.text_field, setup.id_field):
            if isinstance(row, Document):
                documents.append(row)
            else:
                bad.append(row)
    hashes = [corpus_rows.text_hash(document.text) for document in documents]
    in_held_out = _among(hashes, setup.folder / SPILL / HELD_OUT if block.split == "train" else None)

    encoder = _encoder(setup.tokenizer_json, setup.identity)
    sample = _sample([document.text for document in documents])
    why_slow = encoder.why_slow or (
        "" if encoder.agrees(sample) else "gigatoken encodes the sample differently"
    )
    ids = [encoder.encode(document.text, not why_slow) for document in documents]

    rows: dict[str, list[int]] = {"train": [], "eval": []}
    for i, document in enumerate(documents):
        if in_held_out[i]:
            bad.append(
                BadRow(
                    document.file,
                    document.line,
                    "held-out text: a document of corpus.eval has exactly this text",
                )
            )
        elif not len(ids[i]):
            bad.append(
                BadRow(
                    document.file, document.line, "no tokens: the tokenizer drops every character of the text"
                )
            )
        elif block.split == "both":
            rows["eval" if corpus_rows.uniform(hashes[i]) < setup.eval_fraction else "train"].append(i)
        else:
            rows[block.split].append(i)

    shards = []
    for split, taken in rows.items():
        if taken:
            name = f"{split}-{block.number:05d}"
            some, ids_of = [documents[i] for i in taken], [ids[i] for i in taken]
            joined = _joined(ids_of, setup.separator_id, token_files.dtype_for(setup.vocab_size))
            shards.append(_write(setup, name, _tables(some, ids_of), joined))
            repeated_ids.write(
                spilled(setup, name), [d.id for d in some], [d.file for d in some], [d.line for d in some]
            )
    held_out = np.array(hashes if block.split == "eval" else [], "S16")
    return Made(shards, sorted(bad), held_out, n_read, len(sample), why_slow)


def spilled(setup: Setup, name: str) -> Path:
    """Where a shard's ids are listed."""
    return setup.folder / SPILL / f"{name}.npy"


def _among(hashes: list[bytes], path: Path | None) -> np.ndarray:
    """Which of the hashes are in the sorted array at `path`."""
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
def _encoder(tokenizer_json: Path, identity: str) -> encoding.Encoder:
    return encoding.Encoder(tokenizer_json)


def _sample(texts: list[bytes]) -> list[bytes]:
    """Slices of the texts: some spread evenly over all bytes, and as many around the first character that is not ASCII of texts spread
    evenly over those that have one, as this is where encoders differ."""
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


def _joined(
    ids: list[np.ndarray], separator_id: int, dtype: type[np.unsignedinteger]
) -> token_files.Documents:
    """Documents as they are stored, each with the separator in front."""
    separator = np.array([separator_id], dtype)
    offsets = np.cumsum([0, *(1 + len(x) for x in ids)])
    return token_files.Documents(
        np.concatenate([part for x in ids for part in (separator, x)], dtype=dtype), offsets
    )


def _tables(documents: list[Document], ids: list[np.ndarray]) -> Iterator[pa.Table]:
    """The documents' columns, one table per row group."""
    start = 0
    while start < len(documents):
        stop, n_bytes = start, 0
        while stop < len(documents) and n_bytes < _ROW_GROUP_BYTES:
            n_bytes += len(documents[stop].text)
            stop += 1
        some = documents[start:stop]
        text = pa.array([d.text for d in some], pa.binary()).cast(pa.string())
        columns = [[d.id for d in some], text, [len(x) for x in ids[start:stop]], [len(d.text) for d in some]]
        yield pa.table(
            [pa.array(c, f.type) if isinstance(c, list) else c for c, f in zip(columns, SCHEMA, strict=True)],
            schema=SCHEMA,
        )
        start = stop


def _write(setup: Setup, name: str, tables: Iterable[pa.Table], documents: token_files.Documents) -> Entry:
    """Write a shard's two files."""
    made_from = {"tokenizer": setup.identity}
    schema = SCHEMA.with_metadata(
        {"cbtm": json.dumps(artifact.make_meta("documents", made_from), sort_keys=True)}
    )
    n_bytes = 0
    with (
        artifact.publish(setup.folder / f"{name}.parquet") as tmp,
        pq.ParquetWriter(tmp, schema, compression="lz4", use_dictionary=False) as writer,
    ):
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            n_bytes += sum(table["n_bytes"].to_pylist())
    path = setup.folder / f"{name}.arrow"
    token_files.write(path, artifact.make_meta("tokens", made_from), [documents])
    return {
        "name": name,
        "split": name.partition("-")[0],
        "n_documents": len(documents),
        "n_tokens": int(documents.n_tokens.sum()),
        "n_bytes": n_bytes,
        "identity_tokens": artifact.identity(path),
    }


class Dropped(NamedTuple):
    """What came of a shard without some of its rows: its new entry, None if nothing remains, and the ids of these rows."""

    entry: Entry | None
    ids: list[str]


def drop(setup: Setup, work: tuple[Entry, np.ndarray]) -> Dropped:
    """Write a shard again without some rows, given in ascending order."""
    entry, rows = work
    paths = [setup.folder / f"{entry['name']}{suffix}" for suffix in (".parquet", ".arrow")]
    keep = np.ones(entry["n_documents"], bool)
    keep[rows] = False
    with pq.ParquetFile(paths[0]) as file:
        ids = file.read(["doc_id"])["doc_id"].take(pa.array(rows)).to_pylist()
        if keep.any():
            kept = token_files.read(paths[1], 0).take(np.flatnonzero(keep))
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
