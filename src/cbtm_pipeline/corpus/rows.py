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

from cbtm_pipeline.corpus.records import Defect, Part

NO_ID = "id is neither a string nor a number"  # a reason
NO_TOKENS = "no tokens: the tokenizer drops every character of the text"  # a reason


class Document(NamedTuple):
    """A usable document.

    `text` is valid UTF-8 and not blank; `line` counts the rows of file number `file` from 1.
    """

    file: int
    line: int
    id: str
    text: bytes


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


def read(part: Part, text_field: str, id_field: str | None) -> Iterator[Document | BadRow]:
    """Parse and check the records of a part, in order.

    Empty lines do not count as rows, but have a number. With an empty `id_field`, no ids are read.
    """
    parsed = zip(part.parse(part.records, text_field, id_field), n_bytes(part), strict=True)
    for line, (found, size) in enumerate(parsed, part.first):
        if found is None:
            continue
        try:
            if isinstance(found, Defect):
                raise found
            text, found_id = found
            own = _id(found_id) if id_field else None
            yield Document(part.file, line, own or f"{part.name}:{line}", _text(text))
        except Defect as defect:
            yield BadRow(part.file, line, str(defect), size)


def parse_json(
    records: Iterable[bytes], text_field: str, id_field: str | None
) -> Iterator[tuple[Any, Any] | Defect | None]:
    """The (text, id) of JSON objects, each a record; None for an empty record.

    `a.b` is field b within field a.
    """
    for record in records:
        if not record or record.isspace():
            yield None
            continue
        try:
            yield _text_and_id(record, text_field, id_field)
        except Defect as defect:
            yield defect


def parse_text(
    records: Iterable[bytes], text_field: str, id_field: str | None
) -> Iterator[tuple[bytes, None]]:
    """Each record is a text without id; its line ends become \\n."""
    for record in records:
        yield record.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), None


DAMAGED = "damaged file"  # the kind of defect


def parse_damage(records: Iterable[bytes], text_field: str, id_field: str | None) -> Iterator[Defect]:
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


def _text_and_id(record: bytes, text_field: str, id_field: str | None) -> tuple[Any, Any]:
    row = _json_object(record)
    text, found_id = _field(row, text_field), _MISSING if id_field is None else _field(row, id_field)
    if text is _MISSING:
        raise Defect(f"no text field: {text_field} is not among {', '.join(sorted(row))[:200]}")
    if id_field is not None and isinstance(
        found_id, float
    ):  # take the digits as they are written, not rounded
        found_id = _field(json.loads(record, parse_float=str), id_field)
    return text, None if found_id is _MISSING else found_id


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
