"""The text, id and label columns of Arrow files: those of datasets' `save_to_disk`, and of other programs."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cbtm_pipeline.corpus.parquet import columns, unreadable
from cbtm_pipeline.corpus.records import Batch, Source

_MAX_ROWS = 1024  # of a batch
_FILE_MAGIC = b"ARROW1"  # of the file format; the other one is a stream


def cut(source: Source) -> Iterator[Batch]:
    """Cut an Arrow file or stream into record batches with the columns `text`, and `id` and `label` if there.

    Raises ValueError for a file that is damaged or lacks the text column, OSError for an unreadable one.
    """
    path, n_read = source.path, 0
    try:
        with pa.OSFile(str(path)) as raw:
            for batch in _batches(raw):
                takes, _ = columns(path, batch.schema, source.fields)
                found = pa.record_batch({column: take(batch) for column, take in takes.items()})
                row_bytes = found.nbytes // max(1, found.num_rows)
                n_rows = max(1, min(_MAX_ROWS, source.chunk_bytes // max(1, row_bytes)))
                for start in range(0, found.num_rows, n_rows):
                    part = found.slice(start, n_rows)
                    is_last = start + n_rows >= found.num_rows
                    position = raw.tell()
                    yield Batch(part, part.nbytes, position - n_read if is_last else 0)
                    n_read = position if is_last else n_read
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise unreadable(path, error, "an Arrow file") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise unreadable(path, error, "an Arrow file") from error


def _batches(raw: Any) -> Iterator[pa.RecordBatch]:
    is_file = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    raw.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(raw)
        return
    reader = pa.ipc.open_file(raw)
    for i in range(reader.num_record_batches):
        yield reader.get_batch(i)
