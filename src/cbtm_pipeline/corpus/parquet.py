"""The text, id and label columns of Parquet files, as batches of rows."""

import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbtm_pipeline.corpus.records import Batch, Fields, Source

_MAX_ROWS = 1024  # of a batch
_BINARY = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary),
    *([pa.types.is_binary_view] if hasattr(pa.types, "is_binary_view") else []),
)
_ZEROS = re.compile(r"(?<=:\d\d)(\.\d*[1-9])?\.?0*(?=Z?$)")  # at the end of the fraction of a second


def cut(source: Source) -> Iterator[Batch]:
    """Cut a Parquet file into record batches with the columns `text`, and `id` and `label` if there.

    Raises ValueError for a file that is damaged or lacks the text column, OSError for an unreadable one. The
    checksums of its pages count where it has any.
    """
    path = source.path
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            takes, wanted = columns(path, file.schema_arrow, source.fields)
            n_bytes_file, n_rows_file, n_read = path.stat().st_size, file.metadata.num_rows, 0
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                row_bytes = about.total_byte_size // max(1, about.num_rows)
                n_rows = max(1, min(_MAX_ROWS, source.chunk_bytes // max(1, row_bytes)))
                for batch in file.iter_batches(n_rows, row_groups=[group], columns=wanted):
                    table = pa.record_batch({column: take(batch) for column, take in takes.items()})
                    n_read += table.num_rows
                    yield Batch(table, table.nbytes, n_bytes_file * table.num_rows // max(1, n_rows_file))
            if n_read != n_rows_file:
                raise pa.ArrowInvalid(f"{n_read} rows, of {n_rows_file} by its metadata")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise unreadable(path, error) from error  # pyarrow reports damaged pages as an OSError without number


def parse(records: pa.RecordBatch, fields: Fields) -> Iterator[tuple[Any, Any, Any]]:
    """The (text, id, label) of each row. The fields do not matter, as `cut` has chosen the columns."""
    texts, there = _values(records.column("text")), records.schema.names
    names = (_ids(records.column(c)) if c in there else [None] * len(texts) for c in ("id", "label"))
    return zip(texts, *names, strict=True)


_Take = Callable[[pa.RecordBatch], pa.Array]


def columns(path: Path, schema: pa.Schema, fields: Fields) -> tuple[dict[str, _Take], list[str]]:
    """How to take `text`, `id` and `label` out of a batch, as far as they are there, and the fields to read.

    Raises ValueError without text column.
    """
    named = {name: field for name, field in fields._asdict().items() if field is not None}
    takes = {name: take for name, field in named.items() if (take := _column(path, schema, field))}
    if "text" not in takes:
        raise ValueError(
            f"{path}: no column {fields.text}. Expected one of its columns, {', '.join(schema.names)}. "
            "Set corpus.text_field."
        )
    return takes, list(dict.fromkeys(named[name] for name in takes))


def _column(where: Path, schema: pa.Schema, field: str) -> _Take | None:
    """How to take a column out of a batch; None where the schema lacks it. ValueError if it is there twice.

    The field is the name of a column, or `a.b` for field b of column a.
    """
    top, *path = field.split(".")
    if field in schema.names:
        top, path = field, []
    if schema.names.count(top) > 1:
        raise ValueError(
            f"{where}: {schema.names.count(top)} columns {top}. Expected one. Rename the others, or name"
            " another column in corpus.text_field, corpus.id_field or corpus.label_field."
        )
    if field in schema.names:
        return lambda batch: batch.column(field)
    found = schema.field(top).type if path and top in schema.names else None
    for name in path:
        found = (
            found.field(name).type
            if found and pa.types.is_struct(found) and found.get_field_index(name) >= 0
            else None
        )
    return (lambda batch: pc.struct_field(batch.column(top), path)) if found else None  # pyright: ignore[reportAttributeAccessIssue]


def _ids(column: pa.Array) -> list[Any]:
    """Python values of ids and labels. What is no text or number is the usual string of its type."""
    column, found = _plain(column)
    if found == "uuid" or (found == "binary" and pa.types.is_fixed_size_binary(column.type)):
        make = _uuid if found == "uuid" else bytes.hex
        return [None if value is None else make(value) for value in column.to_pylist()]
    if found == "binary":
        return [None if value is None else _text_or_hex(value) for value in column.to_pylist()]
    if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
        return [v and _ZEROS.sub(r"\1", v) for v in column.cast(pa.string()).to_pylist()]
    return _values(column)


def _plain(column: pa.Array) -> tuple[pa.Array, str]:
    """The stored values of a column, and what they are: `uuid`, `binary` or the name of another type."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        name = column.type.extension_name
        return column.storage, "uuid" if name == "arrow.uuid" else str(column.storage.type)
    is_binary = any(is_type(column.type) for is_type in _BINARY)
    return column, "binary" if is_binary else str(column.type)


def _uuid(value: bytes) -> str:
    return str(uuid.UUID(bytes=value))


def _text_or_hex(value: bytes) -> str:
    """Bytes as text if they are printable UTF-8, as of old Spark, else in hexadecimal digits."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, because a Parquet file may hold invalid UTF-8."""
    column, _ = _plain(column)
    if str(column.type) in ("string", "large_string", "string_view"):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def unreadable(path: Path, error: Exception, expected: str = "Parquet") -> ValueError:
    """What to raise for a file that is not `expected`, or damaged."""
    return ValueError(f"{path}: unreadable ({error}). Expected {expected}. Mend the file or leave it out.")
