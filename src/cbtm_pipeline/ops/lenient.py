"""Reading what others write meanwhile: a file that is missing, half there or garbage gives less, never an error."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson


def changed(path: Path) -> float | None:
    """Unix time of the last change, None where there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def listed(folder: Path) -> list[Path]:
    """What is in a folder."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def end(path: Path, n_bytes: int) -> bytes:
    """The last lines of a file, at most n_bytes of it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - n_bytes))
            tail = file.read(n_bytes)
    except OSError:
        return b""
    return tail.partition(b"\n")[2] if size > n_bytes else tail


def rows(path: Path, n_bytes: int) -> list[dict[str, Any]]:
    """The objects in the last lines of a .jsonl, oldest first."""
    return [row for line in end(path, n_bytes).splitlines() if (row := _parse(line))]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return _parse(end(path, 1 << 24))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def number(value: object) -> float | None:
    """A finite number, None for anything else."""
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def numbers(table: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The numbers under `key`, of the rows that have one there."""
    return [value for row in table if (value := number(row.get(key))) is not None]


def median(values: Sequence[float]) -> float | None:
    """None where there are no values."""
    return statistics.median(values) if values else None


def text(value: object) -> str | None:
    """On one line, without what a terminal would obey."""
    return (
        None
        if value is None
        else " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    )
