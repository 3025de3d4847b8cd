"""Files that something has changed: flipped bits, ends that are cut off."""

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A process remembers the hash of a file by its inode, size and time. So each damaged file gets its own time.
_times = itertools.count(1)


def versions(content: bytes, n: int, rng_seed: int = 0) -> Iterator[bytes]:
    """n damaged versions of some bytes: with a bit flipped at a random place; every fourth is cut off."""
    rng = random.Random(rng_seed)
    for i in range(n):
        at = rng.randrange(len(content))
        yield content[:at] if i % 4 == 3 else flipped(content, at, rng.randrange(8))


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    """The bytes with one bit flipped."""
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """Inside this context, the file has other content, or is gone. Afterwards it is as it was."""
    aside = path.with_name(f".{path.name}.whole")
    path.rename(aside)
    try:
        if content is not None:
            path.write_bytes(content)
            at = next(_times)
            os.utime(path, (at, at))
        yield
    finally:
        aside.replace(path)
