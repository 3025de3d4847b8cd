"""The quarantine: the rows of the corpus that cannot be used, as shards/quarantine.jsonl lists them."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import TextIO

from cbtm_pipeline.corpus.rows import BadRow


class Quarantine:
    """Writes the rows that cannot be used to `file`, and counts them by the kind of defect.

    `sources` are the paths of the corpus files, by their number.
    """

    def __init__(self, file: TextIO, sources: list[str]):
        self.file, self.sources = file, sources
        self.n_rows = 0
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, rows: Iterable[BadRow]) -> None:
        """Write one JSON line for each row: `source`, `line`, `reason`."""
        for row in rows:
            source = self.sources[row.file]
            content = {"source": source, "line": row.line, "reason": row.reason}
            self.file.write(json.dumps(content, ensure_ascii=False) + "\n")
            kind = row.reason.partition(":")[0]
            self.n_rows += 1
            self.kinds[kind] += 1
            self.examples.setdefault(kind, f"{source}:{row.line}: {row.reason}")

    def summary(self) -> str:
        """The three most common defects, each with its first row."""
        return "; ".join(f"{n} x {kind} ({self.examples[kind]})" for kind, n in self.kinds.most_common(3))
