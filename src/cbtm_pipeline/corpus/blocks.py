"""The corpus as blocks of raw records.

One process decompresses the files and cuts them into records here, in order; it parses nothing. Memory holds
one block, whatever the size of the corpus. A record is never split.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from cbtm_pipeline.corpus import rows
from cbtm_pipeline.corpus.files import File, format_of
from cbtm_pipeline.corpus.formats import COMPRESSIONS, FORMATS
from cbtm_pipeline.corpus.records import Fields, Part, Source
from cbtm_pipeline.corpus.stream import READ_BYTES

_CHUNK_BYTES = 1 << 18  # fits into the cache of a core
_OVERHEAD = 64  # bytes of memory that a record takes beyond its own


def blocks(parts: Iterable[Part], block_bytes: int) -> Iterator[list[Part]]:
    """Gather parts, also of several files, into blocks of at least `block_bytes`. The last may be smaller."""
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
    fields: Fields,
    txt_documents: Literal["file", "block"],
) -> Iterator[Part]:
    """Yield the records of all files, in order, in parts that are small compared with a block.

    Raises ValueError for a file that is not what its name says, OSError for one that cannot be read. Damaged
    compressed data gives the records before the damage, and one part that stands for the record that the
    damage cut.
    """
    chunk_bytes = min(_CHUNK_BYTES, max(READ_BYTES, block_bytes // 8))
    for number, path, name in files:
        found = format_of(path)
        assert found, path
        suffix, compression = found
        source = Source(path, COMPRESSIONS.get(compression), chunk_bytes, fields, txt_documents)
        first = 1
        for batch in FORMATS[suffix].cut(source):
            parse = rows.parse_damage if batch.damaged else FORMATS[suffix].parse
            n_bytes = batch.n_bytes + _OVERHEAD * len(batch.records)
            yield Part(number, name, first, parse, batch.records, n_bytes, batch.n_read)
            first += len(batch.records)
