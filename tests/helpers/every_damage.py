"""All ways to damage a small file: each bit, each cut."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def damages(path: Path) -> Iterator[str]:
    """Damage a file in place, in one way after the other, and at last mend it. Yields each way in words.

    The ways are every flip of a bit, every byte after the end, the content twice, and every cut.
    """
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:  # to write a new file each time would take much longer
        for i in range(8 * len(whole)):
            _write(file, i // 8, bytes([whole[i // 8] ^ 1 << i % 8]))
            yield f"bit {i % 8} of byte {i // 8} flipped"
            _write(file, i // 8, whole[i // 8 : i // 8 + 1])
        for byte in range(256):
            _write(file, len(whole), bytes([byte]))
            yield f"byte {byte} at the end"
        _write(file, len(whole), whole)
        yield "twice"
        for n in reversed(range(len(whole))):
            file.truncate(n)
            yield f"cut to {n} bytes"
        _write(file, 0, whole)


def _write(file, at: int, content: bytes) -> None:
    file.seek(at)
    file.write(content)


def check_refused(path: Path, read: Callable[[], object]) -> None:
    """Check that `read` answers every damage of the file with an error of the usual form."""
    for damage in damages(path):
        try:
            found = read()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and ". Expected " in str(error), damage
        else:
            pytest.fail(f"{damage}: {found}")
    read()
