"""Raw records parsed and checked: each becomes a document, or a bad row with the reason. No record is dropped
silently.

Text is kept character for character. NUL is a character like any other: byte-level tokenizers, Arrow and
Parquet all hold it. JSON strings keep their line ends. Only in text files do \\r\\n and \\r become \\n,
because there the line ends belong to the file and not to the text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import orjson

from cbtm_pipeline.corpus.records import Defect, Fields, Part

NO_ID = "id is neither a string nor a number"  # a reason
NO_LABEL = "label is neither a string nor a number"  # a reason
NO_TOKENS = "no tokens: the tokenizer drops every character of the text"  # a reason


class Document(NamedTuple):
    """A usable document.

    `text` is valid UTF-8 and not blank; `line` counts the rows of file number `file` from 1. `label` is ""
    for a row without one.
    """

    file: int
    line: int
    id: str
    text: bytes
    label: str = ""


class BadRow(NamedTuple):
    """A row that cannot be used, for the quarantine.

    `reason`: the kind of defect, and after a colon its details. `n_bytes`: those of the record that could not
    be read.
    """

    file: int
    line: int
    reason: str
    n_bytes: int = 0


def n_bytes(part: Part) -> list[int]:
    """The bytes of each record of a part; for columns the mean. None for what says that a file is damaged."""
    if part.parse is parse_damage:
        return [0] * len(part.records)
    if isinstance(part.records, list):
        return list(map(len, part.records))
    return [part.n_bytes // max(1, len(part.records))] * len(part.records)


def read(part: Part, fields: Fields) -> Iterator[Document | BadRow]:
    """Parse and check the records of a part, in order.

    Empty lines do not count as rows, but have a number. With an empty `fields.id`, no ids are read.
    """
    parsed = zip(part.parse(part.records, fields), n_bytes(part), strict=True)
    for line, (found, size) in enumerate(parsed, part.first):
        if found is None:
            continue
        try:
            if isinstance(found, Defect):
                raise found
            text, found_id, label = found
            own = _id(found_id) if fields.id else None
            yield Document(part.file, line, own or f"{part.name}:{line}", _text(text), _label(label))
        except Defect as defect:
            yield BadRow(part.file, line, str(defect), size)


def parse_json(records: Iterable[bytes], fields: Fields) -> Iterator[tuple[Any, Any, Any] | Defect | None]:
    """The (text, id, label) of JSON objects, each a record; None for an empty record.

    `a.b` is field b within field a.
    """
    for record in records:
        if not record or record.isspace():
            yield None
            continue
        try:
            yield _values(record, fields)
        except Defect as defect:
            yield defect


def parse_text(records: Iterable[bytes], fields: Fields) -> Iterator[tuple[bytes, None, None]]:
    """Each record is a text without id and label; its line ends become \\n."""
    for record in records:
        yield record.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), None, None


DAMAGED = "damaged file"  # the kind of defect


def parse_damage(records: Iterable[bytes], fields: Fields) -> Iterator[Defect]:
    """Each record says why the rest of its file could not be read."""
    for record in records:
        yield Defect(record.decode())


def text_hash(text: bytes) -> bytes:
    """A hash of the text, 16 bytes."""
    return hashlib.blake2b(text, digest_size=16).digest()


def uniform(hash_: bytes) -> float:
    """Turn the hash of a text into a number from [0, 1), uniform over texts and the same for equal texts.

    Documents whose number is below corpus.eval_fraction are held out.
    """
    return int.from_bytes(hash_[:6]) / (1 << 48)


_MISSING = object()


def _values(record: bytes, fields: Fields) -> tuple[Any, Any, Any]:
    row = _json_object(record)
    text = _field(row, fields.text)
    if text is _MISSING:
        raise Defect(f"no text field: {fields.text} is not among {', '.join(sorted(row))[:200]}")
    return text, _name(row, fields.id, record), _name(row, fields.label, record)


def _name(row: dict[str, Any], field: str | None, record: bytes) -> Any:
    """The value of an id or a label; None where there is none."""
    found = _MISSING if field is None else _field(row, field)
    if field is not None and isinstance(found, float):  # take the digits as they are written, not rounded
        found = _field(json.loads(record, parse_float=str), field)
    return None if found is _MISSING else found


def _json_object(record: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(record)
    except orjson.JSONDecodeError as error:
        row = _lenient(record, error)
    if not isinstance(row, dict):
        raise Defect(f"not an object: {_type_name(row)}")
    return row


def _lenient(record: bytes, error: orjson.JSONDecodeError) -> Any:
    """Parse what orjson refuses but other programs write:

    NaN, and lone surrogates in fields that may not matter.
    """
    try:
        return json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as bad:
        raise Defect(f"invalid UTF-8: byte 0x{record[bad.start]:02x} at {bad.start} of the row") from None
    except (ValueError, RecursionError):
        raise Defect(f"broken JSON: {error}") from None


def _field(row: Any, field: str) -> Any:
    """`row[field]`, or for `a.b` also `row["a"]["b"]`; _MISSING if there is neither."""
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
        raise Defect(f"text is not a string: {_type_name(value)}")
    if not text or text.isspace():
        raise Defect("empty text")
    return encoded


def _id(value: Any) -> str | None:
    """The document's own id, None where it has none."""
    if value is None or value in ("", b"") or value != value:
        return None
    if isinstance(value, bytes):
        return _decoded(value, "id")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise Defect(f"{NO_ID}: {_type_name(value)}")
    found = str(value)
    _encoded(found, "id")
    return found


def _label(value: Any) -> str:
    """The document's label, "" where it has none. A truth value is `true` or `false`, as in JSON."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        found = _decoded(value, "label")
    elif isinstance(value, bool):
        found = str(value).lower()
    elif isinstance(value, str | int | float | Decimal):
        found = str(value)
        _encoded(found, "label")
    else:
        raise Defect(f"{NO_LABEL}: {_type_name(value)}")
    return "" if found.isspace() else found


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Defect(
            f"lone surrogate: U+{ord(text[error.start]):04X} at character {error.start} of the {what}"
        ) from None


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Defect(
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
