"""Files of bytes cut into raw records, before anything is parsed.

A record becomes one document or one row of the quarantine: a line, an element of a JSON array, a row of a
Parquet file, a text file, or one of its blocks between blank lines.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cbtm_pipeline.corpus.stream import Compression, Stream

# A string, a sign that structures JSON, or the start of a string that does not end here.
# The possessive quantifiers make the search need no stack.
_JSON = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)
_CRS = re.compile(rb"\r+\n?")
_QUOTE = ord('"')

# Parses records: (records, fields) -> for each record its text, id and label, None for a row that does not
# count, or a Defect. Each of the three may have any type: `rows.read` checks them.
Parse = Callable[[Any, "Fields"], Iterable["tuple[Any, Any, Any] | Defect | None"]]
_MAX_TAIL = 1 << 12  # bytes of \r that are kept to see what follows
_Split = Callable[[Iterator[bytes], Stream], Iterator[list[bytes]]]


class Defect(Exception):
    """Says why a record is no document: the kind of defect, and after a colon its details."""


class Fields(NamedTuple):
    """The names of the fields that are read, `a.b` for field b of field a. None: the rows' is not read."""

    text: str
    id: str | None = None
    label: str | None = None


class Source(NamedTuple):
    """A file to cut into records, and how to read it."""

    path: Path
    compression: Compression | None
    chunk_bytes: int  # the cut functions read about so many bytes at a time
    fields: Fields
    txt_documents: Literal["file", "block"]


class Batch(NamedTuple):
    """Consecutive records, as a cut function yields them."""

    records: Any  # has a length: a list of bytes, or what else the parse function of the format takes
    n_bytes: int  # memory of the records
    n_read: int  # bytes of the file that were read for them
    damaged: bool = False  # the one record says why the rest of the file could not be read


class Part(NamedTuple):
    """Consecutive records of one file, with all that is needed to parse them.

    It can be sent to another process.
    """

    file: int  # number of the file
    name: str  # short name of the file, for the ids of documents that have none
    first: int  # number of the first record within the file, counted from 1
    parse: Parse
    records: Any
    n_bytes: int  # memory of the records
    n_read: int  # bytes of the file that were read for them


def cut_lines(source: Source) -> Iterator[Batch]:
    """Cut a file into lines without their newline, empty lines included."""
    return _cut(source, lines)


def cut_json(source: Source) -> Iterator[Batch]:
    """Cut a file of JSON lines, or of one JSON array, into the lines or elements.

    Raises ValueError for an array that has no end or is followed by more data.
    """
    return _cut(source, lines_or_elements)


def cut_text(source: Source) -> Iterator[Batch]:
    """Take a text file as one record, or cut it into blocks of lines, as `txt_documents` says."""
    return _cut(source, _whole if source.txt_documents == "file" else _text_blocks)


def _cut(source: Source, split: _Split) -> Iterator[Batch]:
    with source.path.open("rb") as file:
        stream = Stream(source.path, file, source.compression, source.chunk_bytes)
        n_read, n_bytes = 0, os.fstat(file.fileno()).st_size
        for records in split(stream.chunks(), stream):
            position = file.tell()
            yield Batch(records, sum(map(len, records)), position - n_read)
            n_read = position
        if os.fstat(file.fileno()).st_size < n_bytes:
            raise ValueError(
                f"{source.path}: it became shorter while it was read. Expected it to stay as it is. Start "
                "again when nobody writes it."
            )
        if stream.broken:
            yield Batch([stream.broken.encode()], 0, file.tell() - n_read, damaged=True)


def lines(chunks: Iterator[bytes], stream: Stream) -> Iterator[list[bytes]]:
    """Lines without their newline, empty lines included. A last line that damage cut is left out.

    A line ends with \\n, or with \\r as on old Macs. \\r\\n is one end, and its \\r stays with the line.
    """
    tail: list[bytes] = []
    for chunk in _with_whole_ends(chunks):
        *found, rest = chunk.split(b"\n")
        if found:
            found[0] = b"".join([*tail, found[0]])
            tail = []
            yield found
        tail.append(rest)
    last = b"".join(tail)
    if last and not stream.broken:
        yield [last]


def _with_whole_ends(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, but no chunk ends within a line end; each \\r that ends a line alone is a \\n."""
    tail = b""
    for part in itertools.chain(chunks, [b""]):
        chunk = tail + part
        end = len(chunk.rstrip(b"\r")) if part and len(tail) < _MAX_TAIL else len(chunk)
        chunk, tail = chunk[:end], chunk[end:]
        if chunk.count(b"\r") > chunk.count(b"\r\n"):
            chunk = _CRS.sub(_line_ends, chunk)
        yield chunk


def _line_ends(found: re.Match[bytes]) -> bytes:
    """A run of \\r as it is before a \\n, which it belongs to; else as many \\n."""
    return found[0] if found[0].endswith(b"\n") else b"\n" * len(found[0])


def lines_or_elements(chunks: Iterator[bytes], stream: Stream) -> Iterator[list[bytes]]:
    """The elements of a JSON array if the data starts with `[`, else its lines."""
    head = b""
    while head.isspace() or not head:
        if not (chunk := next(chunks, b"")):
            break
        head += chunk
    split = _elements if head.lstrip().startswith(b"[") else lines
    return split(itertools.chain([head], chunks), stream)


def _elements(chunks: Iterator[bytes], stream: Stream) -> Iterator[list[bytes]]:
    """The elements of a JSON array, cut at its commas but not parsed.

    So a defect affects only the element it is in.
    """
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
                    f"{stream.path}: more data after the end of the JSON array. Expected one array. "
                    "Mend the file."
                )
            return
    if depth and not stream.broken:
        raise ValueError(
            f"{stream.path}: element {n + 1} of the JSON array has no end. Expected [..., ...]. "
            "Mend the file."
        )


def _at_least(n_bytes: int, chunks: Iterator[bytes]) -> bytes:
    """The next chunks, at least `n_bytes` of them. So a long element is searched only a few times."""
    gathered = [next(chunks, b"")]
    while sum(map(len, gathered)) < n_bytes and (chunk := next(chunks, b"")):
        gathered.append(chunk)
    return b"".join(gathered)


def _whole(chunks: Iterator[bytes], stream: Stream) -> Iterator[list[bytes]]:
    """The whole file as one record; nothing if the file is damaged."""
    text = b"".join(chunks)
    if not stream.broken:
        yield [text]


def _text_blocks(chunks: Iterator[bytes], stream: Stream) -> Iterator[list[bytes]]:
    """The blocks of lines between blank lines."""
    block: list[bytes] = []
    for some in lines(chunks, stream):
        found = []
        for line in some:
            if line and not line.isspace():
                block.append(line)
            elif block:
                found.append(b"\n".join(block).removesuffix(b"\r"))
                block = []
        if found:
            yield found
    if block and not stream.broken:
        yield [b"\n".join(block).removesuffix(b"\r")]
