"""What is remembered of a job in its folder: small JSON files, and events.jsonl, only ever appended to. Standard library only."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.base.publish import publish

FILE = "events.jsonl"
MAX_TRIES = 3  # starts (or submissions) in a row that may bring nothing

Event = dict[str, Any]


def add(folder: Path, event: str, **values: Any) -> None:
    """Append one row; rows of processes on several nodes do not mix, as each is one write."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, sort_keys=True) + "\n"
    fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, line.encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def read(folder: Path) -> list[Event]:
    """Every whole row, oldest first."""
    try:
        lines = (folder / FILE).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "event" in row]


def of_this_work(events: Sequence[Event], fingerprint: str) -> list[Event]:
    """The rows since a result was last taken, as far as they are of the work with this fingerprint."""
    taken = [i for i, row in enumerate(events) if row["event"] == "taken"]
    return [row for row in events[taken[-1] + 1 if taken else 0 :] if row.get("fingerprint") == fingerprint]


def n_tries(events: Sequence[Event], kind: str, step: int | None) -> int:
    """How many events of this kind in a row, up to the newest, had the saved step `step`: tries that brought nothing new."""
    n = 0
    for row in reversed(events):
        if row["event"] == kind:
            if row.get("step") != step:
                break
            n += 1
    return n


def saved_step(work: Path | None) -> int | None:
    """Step of the newest saved state in a training's work folder, None where there is none (or no work folder)."""
    files = work.glob("state/step-*.safetensors") if work else ()
    return max((int(file.stem.removeprefix("step-")) for file in files), default=None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all. artifact.write_json would load NumPy into every launcher."""
    with publish(path) as tmp:
        tmp.write_text(json.dumps(content, sort_keys=True), "utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of such a file, None where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
