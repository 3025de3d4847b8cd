"""What a job's folder remembers: small JSON files and the history events.jsonl. Standard library only."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.base.publish import open_file, publish

FILE = "events.jsonl"
MAX_TRIES = 3  # starts (or submissions) in a row without a new saved step

Event = dict[str, Any]


def add(folder: Path, event: str, **values: Any) -> None:
    """Append one event. Each is a single write, so the rows of processes on several nodes do not mix."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, sort_keys=True) + "\n"
    fd = open_file(folder / FILE, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def read(folder: Path) -> list[Event]:
    """All whole events, the oldest first."""
    try:
        lines = (folder / FILE).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict) and "event" in row]


def of_this_work(events: Sequence[Event], fingerprint: str) -> list[Event]:
    """The events since a result was last taken, without those of work with another fingerprint."""
    taken = [i for i, row in enumerate(events) if row["event"] == "taken"]
    return [row for row in events[taken[-1] + 1 if taken else 0 :] if row.get("fingerprint") == fingerprint]


def n_tries(events: Sequence[Event], kind: str, step: int | None) -> int:
    """How many newest events of this kind in a row had the saved step `step`: tries without progress."""
    n = 0
    for row in reversed(events):
        if row["event"] == kind:
            if row.get("step") != step:
                break
            n += 1
    return n


def saved_step(work: Path | None) -> int | None:
    """Step of the newest saved state in a training's work folder; None if there is no state or no folder."""
    files = work.glob("state/step-*.safetensors") if work else ()
    return max((int(file.stem.removeprefix("step-")) for file in files), default=None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all. artifact.write_json would load NumPy into every launcher."""
    with publish(path) as tmp:
        tmp.write_text(json.dumps(content, sort_keys=True), "utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file of write_json; None if there is no such file, or if it is none of these."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
