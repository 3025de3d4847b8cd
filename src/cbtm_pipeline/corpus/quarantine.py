"""The quarantine: the rows of the corpus that cannot be used, as shards/quarantine.jsonl lists them."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import TextIO

from cbtm_pipeline.base.printable import UNSAFE, shortened
from cbtm_pipeline.corpus.rows import DAMAGED, BadRow

_MAX_REASON = 400  # characters


class Quarantine:
    """Writes the rows that cannot be used to `file`, and counts them by the kind of defect.

    `sources` are the paths of the corpus files, by their number.
    """

    def __init__(self, file: TextIO, sources: list[str]):
        self.file, self.sources = file, sources
        self.n_rows = self.n_bytes = 0
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, rows: Iterable[BadRow]) -> None:
        """Write one JSON line for each row: `source`, `line`, `reason`."""
        for row in rows:
            source = self.sources[row.file]
            reason = shortened(row.reason, _MAX_REASON)
            content = {"source": source, "line": row.line, "reason": reason}
            self.file.write(_safe(json.dumps(content, ensure_ascii=False)) + "\n")
            kind = reason.partition(":")[0]
            self.n_rows += 1
            self.n_bytes += row.n_bytes
            self.kinds[kind] += 1
            self.examples.setdefault(kind, f"{source}:{row.line}: {reason}")

    @property
    def n_damaged(self) -> int:
        """The number of damaged files. Each has one row, however much of it is missing."""
        return self.kinds[DAMAGED]

    def summary(self) -> str:
        """The three most common defects, each with its first row."""
        return "; ".join(f"{n} x {kind} ({self.examples[kind]})" for kind, n in self.kinds.most_common(3))


def _safe(line: str) -> str:
    """A line of JSON in which what could move a terminal's cursor is an escape of JSON."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
