"""The decompressed bytes of one corpus file, in chunks."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from isal import isal_zlib

_BOM = b"\xef\xbb\xbf"
# Bytes of a compressed file that are decompressed at a time. Damage loses at most so many, and the number
# bounds the size of the decompressed data.
READ_BYTES = 1 << 12


class Compression(NamedTuple):
    """How files of one compression are recognised and decompressed."""

    magic: re.Pattern[bytes]  # matches the first bytes of a compressed file
    # Makes the decompressor of one frame, an object with the interface of `zlib.decompressobj`.
    decompressor: Callable[[], Any]
    error: type[Exception]  # what the decompressor raises for damaged data
    padding: bytes  # bytes that may fill the space between two frames
    unpacked: float  # bytes of decompressed data per byte of the file, roughly


def _gzip() -> Any:
    return isal_zlib.decompressobj(wbits=31)


def _zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# Some archives pad gzip members with zero bytes.
GZIP = Compression(re.compile(rb"\x1f\x8b"), _gzip, isal_zlib.error, b"\0", 3)  # pyright: ignore[reportArgumentType]
# Parallel zstd compressors put frames without data first; these frames have their own magic numbers.
ZSTD = Compression(
    re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd, zstandard.ZstdError, b"", 4
)


class Stream:
    """The decompressed bytes of the open file `file`, in chunks of about `chunk_bytes`.

    After the last chunk, `broken` says why compressed data ended early; "" if the data is complete.
    """

    def __init__(
        self, path: Path, file: io.BufferedReader, compression: Compression | None, chunk_bytes: int
    ):
        self.path, self.file, self.compression, self.chunk_bytes = path, file, compression, chunk_bytes
        self.broken = ""

    def chunks(self) -> Iterator[bytes]:
        """Yield the chunks, without a byte-order mark at the start.

        Raises ValueError for a file that does not have the compression of its name, OSError for an unreadable
        one.
        """
        plain = iter(lambda: self.file.read(self.chunk_bytes), b"")
        chunks = self._decompressed(self.compression) if self.compression else plain
        try:
            yield next(chunks, b"").removeprefix(_BOM)
            yield from chunks
        except OSError as error:  # the error of a failing disk does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _decompressed(self, compression: Compression) -> Iterator[bytes]:
        start = self.file.peek(4)[:4]
        if not start:
            self.broken = "damaged file: it is empty, and compressed data never is"
            return
        if not compression.magic.match(start):
            raise ValueError(
                f"{self.path}: not {self.path.suffix.lower()} data. Expected what the name says. "
                "Correct the name or the file."
            )
        gathered, n_bytes = [], 0
        for data in self._frames(compression):
            gathered.append(data)
            n_bytes += len(data)
            if n_bytes >= self.chunk_bytes:
                yield b"".join(gathered)
                gathered, n_bytes = [], 0
        yield b"".join(gathered)

    def _frames(self, compression: Compression) -> Iterator[bytes]:
        """The data of all zstd frames or gzip members, in order."""
        decompressor = None
        while data := self.file.read(READ_BYTES):
            while data:
                if decompressor is None:
                    data = data.lstrip(compression.padding) if compression.padding else data
                    if not data:
                        break
                    decompressor = compression.decompressor()
                try:
                    yield decompressor.decompress(data)
                except compression.error as error:
                    if "ictionary" in str(error):
                        raise ValueError(
                            f"{self.path}: compressed with a dictionary. Expected data that is complete in "
                            "itself. Compress it again without one."
                        ) from error
                    self.broken = f"damaged file: {error}"
                    return
                data = b""
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
        if decompressor:
            self.broken = "damaged file: the compressed data breaks off"
