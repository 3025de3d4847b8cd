"""Read files that other processes write meanwhile.

A missing, partial or wrong file gives less, never an error.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson


def changed(path: Path) -> float | None:
    """Unix time of the last change; None if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def listed(folder: Path) -> list[Path]:
    """The paths in a folder; none if there is no folder."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def end(path: Path, n_bytes: int) -> bytes:
    """The last whole lines of a file, at most `n_bytes`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - n_bytes))
            tail = file.read(n_bytes)
    except OSError:
        return b""
    return tail.partition(b"\n")[2] if size > n_bytes else tail


def rows(path: Path, n_bytes: int) -> list[dict[str, Any]]:
    """The JSON objects in the last `n_bytes` of a .jsonl file, the oldest first."""
    return [row for line in end(path, n_bytes).splitlines() if (row := _parse(line))]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    return _parse(end(path, 1 << 24))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(table: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The numbers under `key`, from the rows that have one."""
    return [value for row in table if (value := number(row.get(key))) is not None]


def median(values: Sequence[float]) -> float | None:
    """The median; None if there are no values."""
    return statistics.median(values) if values else None


def text(value: object) -> str | None:
    """The value as one line of text, without control characters; None stays None."""
    if value is None:
        return None
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
