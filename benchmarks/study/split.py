"""Split a labelled corpus of JSON lines into training and held-out text, for the study.

    python benchmarks/study/split.py --out split corpora/technical-*.jsonl.zst

A long document was cut into parts ID#p0, ID#p1 ... . All parts of a document fall on the same side, by a
hash of the id without the suffix. Rows are kept as they are. Writes train.jsonl.zst and held-out.jsonl.zst.
"""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import zstandard


def is_held_out(doc_id: str, share: float) -> bool:
    """Whether a document is held out, by a hash of its id without the number of the part."""
    digest = hashlib.sha256(re.sub(r"#p\d+$", "", doc_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def rows(paths: list[Path]) -> Iterator[str]:
    """The lines of all files, in order."""
    for path in paths:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as raw:
            yield from io.TextIOWrapper(raw, encoding="utf-8", newline="\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("corpus", nargs="+", type=Path, help=".jsonl.zst files whose rows have id and text")
    p.add_argument("--out", required=True, type=Path, help="folder for both files")
    p.add_argument("--share", type=float, default=0.015, help="share of the documents to hold out")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with written(args.out / "train.jsonl.zst") as train, written(args.out / "held-out.jsonl.zst") as held_out:
        for row in rows(args.corpus):
            side = held_out if is_held_out(json.loads(row)["id"], args.share) else train
            side.write(row.encode())


def written(path: Path) -> AbstractContextManager[IO[bytes]]:
    """A compressed file to write to."""
    return zstandard.open(path, "wb")


if __name__ == "__main__":
    main()
