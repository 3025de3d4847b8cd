"""Raw records parsed and validated: each becomes a document, or a bad row with the reason. Nothing is dropped in silence.

Text is kept as it is, character for character: NUL is a character like any other (byte-level tokenizers, Arrow and Parquet all hold it),
and JSON strings keep their line ends. Only in text files, where line ends are the file's and not the text's, do \\r\\n and \\r become \\n.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from cbtm_pipeline.corpus.blocks import Part


class Document(NamedTuple):
    """A document that can be used. `text` is valid UTF-8, not blank; `line` counts the rows of file number `file` from 1."""

    file: int
    line: int
    id: str
    text: bytes


class BadRow(NamedTuple):
    """A row that cannot be used, as the quarantine names it. `reason`: the kind of defect, and after a colon its details."""

    file: int
    line: int
    reason: str


class _Defect(Exception):
    """Says why a record is no document."""


def read(part: Part, text_field: str, id_field: str) -> Iterator[Document | BadRow]:
    """Parse the records of a part, in order. Empty lines are no rows."""
    if part.kind == "break":
        yield BadRow(part.file, part.first, part.records[0].decode())
        return
    for line, record in enumerate(_records(part), part.first):
        if part.kind == "json" and (not record or record.isspace()):
            continue
        try:
            if part.kind == "json":
                text, found_id = _text_and_id(record, text_field, id_field)
            elif part.kind == "text":
                text, found_id = record.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), None
            else:
                text, found_id = record
            yield Document(part.file, line, _id(found_id) or f"{part.name}:{line}", _text(text))
        except _Defect as defect:
            yield BadRow(part.file, line, str(defect))


def text_hash(text: bytes) -> bytes:
    """16 bytes that stand for the text."""
    return hashlib.blake2b(text, digest_size=16).digest()


def uniform(hash_: bytes) -> float:
    """A number from [0, 1), uniform over texts: documents below corpus.eval_fraction are held out. Equal texts get equal numbers."""
    return int.from_bytes(hash_[:6]) / (1 << 48)


_MISSING = object()


def _text_and_id(record: bytes, text_field: str, id_field: str) -> tuple[Any, Any]:
    row = _json_object(record)
    text, found_id = _field(row, text_field), _field(row, id_field)
    if text is _MISSING:
        raise _Defect(f"no text field: {text_field} is not among {', '.join(sorted(row))[:200]}")
    if isinstance(found_id, float):
        found_id = _field(
            json.loads(record, parse_float=str), id_field
        )  # the digits as they stand, not rounded
    return text, found_id


def _json_object(record: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError as error:
        row = _lenient(record, error)
    if not isinstance(row, dict):
        raise _Defect(f"not an object: {_type_name(row)}")
    return row


def _lenient(record: bytes, error: orjson.JSONDecodeError) -> Any:
    """What orjson refuses but other writers make: NaN, lone surrogates in fields that may not matter."""
    try:
        return json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as bad:
        raise _Defect(f"invalid UTF-8: byte 0x{record[bad.start]:02x} at {bad.start} of the row") from None
    except (ValueError, RecursionError):
        raise _Defect(f"broken JSON: {error}") from None


def _field(row: Any, field: str) -> Any:
    """`row[field]`, or for `a.b` also `row["a"]["b"]`."""
    if field in row:
        return row[field]
    for name in field.split("."):
        if not isinstance(row, dict) or name not in row:
            return _MISSING
        row = row[name]
    return row


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        text, encoded = value, _encoded(value, "text")
    elif isinstance(value, bytes):
        text, encoded = _decoded(value, "text"), value
    else:
        raise _Defect(f"text is not a string: {_type_name(value)}")
    if not text or text.isspace():
        raise _Defect("empty text")
    return encoded


def _id(value: Any) -> str | None:
    """The document's own name, None where it has none."""
    if value is _MISSING or value is None or value in ("", b"") or value != value:
        return None
    if isinstance(value, bytes):
        return _decoded(value, "id")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _Defect(f"id is neither a string nor a number: {_type_name(value)}")
    found = str(value)
    _encoded(found, "id")
    return found


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Defect(
            f"lone surrogate: U+{ord(text[error.start]):04X} at character {error.start} of the {what}"
        ) from None


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Defect(
            f"invalid UTF-8: byte 0x{text[error.start]:02x} at {error.start} of the {what}"
        ) from None


def _type_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _records(part: Part) -> Iterable[Any]:
    """The raw records; of a table (text, id) of its rows."""
    if part.kind != "table":
        return part.records
    table: Any = part.records
    texts = _values(table.column("text"))
    ids = _values(table.column("id")) if "id" in table.schema.names else [None] * len(texts)
    return zip(texts, ids, strict=True)


def _values(column: pa.Array) -> list[Any]:
    """Python values, strings as bytes: a Parquet file may hold invalid UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if str(column.type) in ("string", "large_string", "string_view"):
        column = column.cast(pa.large_binary())
    return column.to_pylist()
