"""The corpus as blocks of raw records: files are decompressed and cut into records here, in one process and in order; nothing is parsed.

A record is what becomes one document or one row of the quarantine: a line, an element of a JSON array, a row of a Parquet file, a text file
or one of its blocks between blank lines. Memory holds one block, whatever the size of the corpus; a record is never split.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard
from isal import isal_zlib

from cbtm_pipeline.corpus.files import File, format_of

_BOM = b"\xef\xbb\xbf"
_READ = (
    1 << 12
)  # bytes of a compressed file that are decompressed at a time: what damage takes with it, and a bound on what they swell to
_CHUNK = 1 << 18  # stays in the cache of a core
_OVERHEAD = 64  # bytes that a record costs beyond its own
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
_MAGIC_SKIPPABLE = re.compile(
    rb"[\x50-\x5f]\x2a\x4d\x18"
)  # zstd frames without data, which parallel compressors put first

# A string, a sign that structures JSON, or the start of a string that does not end here. Possessive, so that it needs no stack.
_QUOTE = ord('"')
_JSON = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)


class Part(NamedTuple):
    """Consecutive records of one file."""

    file: int  # number of the file
    name: str  # its short name, which names documents without id
    first: int  # number of the first record in the file, from 1
    kind: Literal[
        "json", "text", "table", "break"
    ]  # break: the one record says why the rest of the file could not be read
    records: list[bytes] | pa.RecordBatch  # a table has the columns `text` and, if the file has one, `id`
    n_bytes: int  # memory of the records
    n_read: int  # bytes of the file that were read for them


def blocks(parts: Iterable[Part], block_bytes: int) -> Iterator[list[Part]]:
    """Gather parts, also of several files, into blocks of at least `block_bytes`, the last one excepted."""
    block, n_bytes = [], 0
    for part in parts:
        block.append(part)
        n_bytes += part.n_bytes
        if n_bytes >= block_bytes:
            yield block
            block, n_bytes = [], 0
    if block:
        yield block


def parts(
    files: Iterable[File],
    block_bytes: int,
    text_field: str,
    id_field: str,
    txt_documents: Literal["file", "block"],
) -> Iterator[Part]:
    """The records of all files, in order, in parts that are small against a block.

    Raises ValueError for a file that is not what its name says, OSError for one that cannot be read. Compressed data that breaks off gives
    what came before, and one part of kind `break` that stands for the record that was cut.
    """
    size = min(_CHUNK, max(_READ, block_bytes // 8))
    for number, path, name in files:
        found = format_of(path)
        assert found, path
        suffix, compression = found
        if suffix == ".parquet":
            yield from _table_parts(number, path, name, size, text_field, id_field)
            continue
        cut = {
            ".jsonl": _lines,
            ".json": _json,
            ".txt": _text_file if txt_documents == "file" else _text_blocks,
        }[suffix]
        kind = "text" if suffix == ".txt" else "json"
        with path.open("rb") as file:
            stream = _Stream(path, file, compression, size)
            first, n_read = 1, 0
            for records in cut(iter(stream), stream):
                position = file.tell()
                n_bytes = sum(map(len, records)) + _OVERHEAD * len(records)
                yield Part(number, name, first, kind, records, n_bytes, position - n_read)
                first, n_read = first + len(records), position
            if stream.broken:
                yield Part(
                    number, name, first, "break", [stream.broken.encode()], _OVERHEAD, file.tell() - n_read
                )


class _Stream:
    """The decompressed bytes of a file, in chunks of about `size`. Once they have ended, `broken` says why they ended early."""

    def __init__(self, path: Path, file: io.BufferedReader, compression: str, size: int):
        self.path, self.file, self.compression, self.size = path, file, compression, size
        self.broken = ""

    def __iter__(self) -> Iterator[bytes]:
        chunks = self._decompressed() if self.compression else iter(lambda: self.file.read(self.size), b"")
        try:
            yield next(chunks, b"").removeprefix(_BOM)
            yield from chunks
        except OSError as error:  # a failing disk does not say which file it failed on
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _decompressed(self) -> Iterator[bytes]:
        magic = self.file.peek(4)[:4]
        if (
            magic
            and not magic.startswith(_MAGIC[self.compression])
            and not (self.compression == ".zst" and _MAGIC_SKIPPABLE.match(magic))
        ):
            raise ValueError(
                f"{self.path}: not {self.compression} data. Expected what the name says. Correct the name or the file."
            )
        gathered, n_bytes = [], 0
        for data in self._frames():
            gathered.append(data)
            n_bytes += len(data)
            if n_bytes >= self.size:
                yield b"".join(gathered)
                gathered, n_bytes = [], 0
        yield b"".join(gathered)

    def _frames(self) -> Iterator[bytes]:
        """The data of one zstd frame or gzip member after the other."""
        decompressor = None
        while data := self.file.read(_READ):
            while data:
                if decompressor is None and self.compression == ".gz":
                    data = data.lstrip(b"\0")  # padding that some archives add
                    if not data:
                        break
                decompressor = decompressor or _decompressor(self.compression)
                try:
                    yield decompressor.decompress(data)
                except (zstandard.ZstdError, isal_zlib.error) as error:  # pyright: ignore[reportGeneralTypeIssues]
                    self.broken = f"damaged file: {error}"
                    return
                data = b""
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
        if decompressor:
            self.broken = "damaged file: the compressed data breaks off"


def _decompressor(compression: str) -> Any:
    if compression == ".gz":
        return isal_zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _lines(chunks: Iterator[bytes], stream: _Stream) -> Iterator[list[bytes]]:
    """Lines without their newline, empty ones included."""
    tail: list[bytes] = []
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*tail, lines[0]])
            tail = []
            yield lines
        tail.append(rest)
    last = b"".join(tail)
    if last and not stream.broken:
        yield [last]


def _json(chunks: Iterator[bytes], stream: _Stream) -> Iterator[list[bytes]]:
    """JSON lines, or the elements of one array."""
    head = b""
    while head.isspace() or not head:
        if not (chunk := next(chunks, b"")):
            break
        head += chunk
    cut = _elements if head.lstrip().startswith(b"[") else _lines
    return cut(itertools.chain([head], chunks), stream)


def _elements(chunks: Iterator[bytes], stream: _Stream) -> Iterator[list[bytes]]:
    """The elements of a JSON array, cut at its commas but not parsed: what is wrong within an element stays there."""
    text, start, position, depth, n = b"", 0, 0, 0, 0
    while chunk := _at_least(len(text) - start, chunks):
        text, start, position = text[start:] + chunk, 0, position - start
        elements = []
        for token in _JSON.finditer(text, position):
            sign, length = text[token.start()], token.end() - token.start()
            if sign == _QUOTE and length == 1:
                break
            position = token.end()
            if sign in b"[{":
                depth += 1
                start = position if depth == 1 else start
            elif sign in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and sign in b","):
                elements.append(text[start : token.start()])
                start = position
            if depth == 0:
                break
        n += len(elements)
        if elements:
            yield elements
        if depth == 0:
            if text[position:].strip() or any(chunk.strip() for chunk in chunks):
                raise ValueError(
                    f"{stream.path}: more data after the end of the JSON array. Expected one array. Mend the file."
                )
            return
    if depth and not stream.broken:
        raise ValueError(
            f"{stream.path}: element {n + 1} of the JSON array has no end. Expected [..., ...]. Mend the file."
        )


def _at_least(n_bytes: int, chunks: Iterator[bytes]) -> bytes:
    """The next chunks, so many that a long element is searched only a few times."""
    gathered = [next(chunks, b"")]
    while sum(map(len, gathered)) < n_bytes and (chunk := next(chunks, b"")):
        gathered.append(chunk)
    return b"".join(gathered)


def _text_file(chunks: Iterator[bytes], stream: _Stream) -> Iterator[list[bytes]]:
    """The whole file as one record."""
    text = b"".join(chunks)
    if not stream.broken:
        yield [text]


def _text_blocks(chunks: Iterator[bytes], stream: _Stream) -> Iterator[list[bytes]]:
    """The blocks of lines between blank lines."""
    block: list[bytes] = []
    for lines in _lines(chunks, stream):
        found = []
        for line in lines:
            if line and not line.isspace():
                block.append(line)
            elif block:
                found.append(b"\n".join(block).removesuffix(b"\r"))
                block = []
        if found:
            yield found
    if block and not stream.broken:
        yield [b"\n".join(block).removesuffix(b"\r")]


def _table_parts(
    number: int, path: Path, name: str, size: int, text_field: str, id_field: str
) -> Iterator[Part]:
    """The text and id columns of a Parquet file, some rows at a time."""
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            take_text, take_id = (_column(file.schema_arrow, field) for field in (text_field, id_field))
            if take_text is None:
                columns = ", ".join(file.schema_arrow.names)
                raise ValueError(
                    f"{path}: no column {text_field}. Expected one of its columns, {columns}. Set corpus.text_field."
                )
            takes = {"text": take_text} | ({"id": take_id} if take_id else {})
            wanted = [field for field, take in ((text_field, take_text), (id_field, take_id)) if take]
            n_bytes_file, n_rows_file, first = path.stat().st_size, file.metadata.num_rows, 1
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                row_bytes = about.total_byte_size // max(1, about.num_rows)
                n_rows = max(1, min(1024, size // max(1, row_bytes)))
                for batch in file.iter_batches(n_rows, row_groups=[group], columns=wanted):
                    table = pa.record_batch({column: take(batch) for column, take in takes.items()})
                    n_read = n_bytes_file * table.num_rows // n_rows_file
                    yield Part(
                        number, name, first, "table", table, table.nbytes + _OVERHEAD * table.num_rows, n_read
                    )
                    first += table.num_rows
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(path, error) from error  # damaged pages


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: unreadable ({error}). Expected Parquet. Mend the file or leave it out.")


def _column(schema: pa.Schema, field: str) -> Callable[[pa.RecordBatch], pa.Array] | None:
    """How to take a column out of a batch: by its own name, or as `a.b`, field b of column a; None where the schema has neither."""
    if field in schema.names:
        return lambda batch: batch.column(field)
    top, *path = field.split(".")
    found = schema.field(top).type if path and top in schema.names else None
    for name in path:
        found = (
            found.field(name).type
            if found and pa.types.is_struct(found) and found.get_field_index(name) >= 0
            else None
        )
    return (lambda batch: pc.struct_field(batch.column(top), path)) if found else None  # pyright: ignore[reportAttributeAccessIssue]
