"""The file formats of a corpus, and the compressions that a file may have on top of its format.

This is the one place that lists them. A new format is a new entry in FORMATS with its two functions. Imports
nothing heavy, because the workflow reads the tables too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cbtm_pipeline.corpus import records, rows
from cbtm_pipeline.corpus.records import Batch, Fields, Parse, Source
from cbtm_pipeline.corpus.stream import GZIP, ZSTD, Compression


class Format(NamedTuple):
    """How the files of one format are read."""

    cut: Callable[[Source], Iterator[Batch]]  # cuts a file into records, in the process that reads the corpus
    # Gives the (text, id, label) of each record, in the workers. They import it, so it is a function at a
    # module's top level.
    parse: Parse
    compressible: bool  # whether the file may be compressed as a whole
    unpacked: float  # bytes of text per byte of the file, roughly


def _cut_parquet(source: Source) -> Iterator[Batch]:
    from cbtm_pipeline.corpus import parquet  # loads pyarrow, which the workflow does without

    return parquet.cut(source)


def _cut_arrow(source: Source) -> Iterator[Batch]:
    from cbtm_pipeline.corpus import arrow_file

    return arrow_file.cut(source)


def _parse_parquet(found: Any, fields: Fields) -> Iterator[tuple[Any, Any, Any]]:
    from cbtm_pipeline.corpus import parquet

    return parquet.parse(found, fields)


FORMATS: dict[str, Format] = {
    ".jsonl": Format(records.cut_lines, rows.parse_json, compressible=True, unpacked=1),
    ".json": Format(records.cut_json, rows.parse_json, compressible=True, unpacked=1),
    ".txt": Format(records.cut_text, rows.parse_text, compressible=True, unpacked=1),
    ".parquet": Format(_cut_parquet, _parse_parquet, compressible=False, unpacked=3),
    ".arrow": Format(_cut_arrow, _parse_parquet, compressible=False, unpacked=1),
}
COMPRESSIONS: dict[str, Compression] = {".gz": GZIP, ".zst": ZSTD}
