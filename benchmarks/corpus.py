"""Compare our path from text to the token shards of every cluster with the published recipe, in one run.

    python benchmarks/corpus.py --corpus 'texts/*.jsonl.zst' --tokenizer folder/with/tokenizer --compare-ids

Both read the same text on the same cores. Ours are the rules as the workflow runs them: processes that start,
read, check, write and fsync. The recipe (benchmarks/recipe.py) gets its text as plain JSON lines, one process
per core, and its embedder in memory. The time to fit the embedder and k-means is shown separately for both,
because they are fitted on a sample, and so this time does not grow with the corpus. Without --corpus, the
built-in demo corpus is read.

Cost model of ours, in bytes per byte of document, for English text and a vocabulary of 50 000 tokens (0.31
tokens per byte). shard reads 1, encodes it, and writes 0.62 (ids) + 0.47 (lz4 text). embed reads 0.62, reads
125 of E mostly from the cache (400 per token), and writes 0.1 (400 per document). assign reads 0.72 and
writes 0.62.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import recipe
import tokenizers
from growth import MB, ROOT, configured, rules

from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.corpus.records import Fields

COMPARED_AT_ONCE = 1000  # documents


def plain_copies(patterns: list[str], folder: Path, n_files: int, demo: Path) -> tuple[list[Path], int]:
    """Write the corpus as `n_files` plain JSON-lines files of similar size; returns them and the bytes of
    text.

    A document whose id came before is left out. Ours would have to write its shard again, and the recipe does
    not look for such documents.
    """
    paths = [folder / f"text-{i}.jsonl" for i in range(n_files)]
    files = [path.open("wb") for path in paths]
    total, ids = 0, set[str]()
    fields = Fields("text", "id")
    for part in corpus_blocks.parts(
        corpus_files.name(corpus_files.input_files(patterns, demo)), 1 << 23, fields, "file"
    ):
        for row in corpus_rows.read(part, fields):
            if isinstance(row, corpus_rows.Document) and row.id not in ids:
                ids.add(row.id)
                smallest = min(files, key=lambda file: file.tell())
                smallest.write(
                    json.dumps({"id": row.id, "text": row.text.decode()}, ensure_ascii=False).encode() + b"\n"
                )
                total += len(row.text)
    for file in files:
        file.close()
    return paths, total


def fitting_seconds(log: Path) -> float:
    """The time that rule embed took to fit its embedder, from its log."""
    found = re.search(r"fitted on \d+ documents in ([\d.]+) s", log.read_text("utf-8"))
    assert found, log
    return float(found[1])


def differing(folder: Path) -> tuple[int, int, int]:
    """Count the documents, the tokens, and the documents with other ids than the reference, in all shards."""
    import pyarrow.parquet as pq

    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    reference.encode_special_tokens = True
    n_documents = n_tokens = n_differ = 0
    for path in sorted((folder / "shards").glob("*.arrow")):
        documents, start = token_files.read_unverified(path, 0), 0
        for batch in pq.ParquetFile(path.with_suffix(".parquet")).iter_batches(
            COMPARED_AT_ONCE, columns=["text"]
        ):
            for i, encoding in enumerate(
                reference.encode_batch_fast(batch["text"].to_pylist(), add_special_tokens=False), start
            ):
                ids = documents.values[documents.offsets[i] + 1 : documents.offsets[i + 1]]
                n_differ += not np.array_equal(ids, np.array(encoding.ids))
                n_tokens += len(ids)
            start += batch.num_rows
        n_documents += start
    return n_documents, n_tokens, n_differ


def sample(paths: list[Path], n: int) -> list[str]:
    """About n texts, spread evenly over all files."""

    def lines() -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                yield from file

    n_documents = sum(1 for _ in lines())
    every = max(1, n_documents // n)
    return [json.loads(line)["text"] for i, line in enumerate(lines()) if i % every == 0][:n]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", nargs="+", default=["builtin:demo"], help="files, folders or globs")
    p.add_argument(
        "--demo",
        type=Path,
        default=ROOT / "results/demo/corpus.jsonl.zst",
        help="the built-in corpus, made by the workflow",
    )
    p.add_argument(
        "--tokenizer", help="folder with tokenizer.json; without it, one of 16 384 tokens is trained"
    )
    p.add_argument("--workers", type=int, default=2, help="processes and threads of both sides")
    p.add_argument("--k", type=int, default=16, help="number of clusters")
    p.add_argument(
        "--fit-documents",
        type=int,
        help="documents that both embedders are fitted on; without it, embed.fit_documents of config.yaml",
    )
    p.add_argument(
        "--compare-ids", action="store_true", help="compare every token id with the reference tokenizer's"
    )
    p.add_argument("--no-recipe", action="store_true", help="run ours alone")
    return p.parse_args()


class Report:
    """Prints one line for each measured step of a corpus with `n_bytes` bytes of text."""

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes

    def line(self, who: str, what: str, seconds: float, note: str = "") -> None:
        """Print the time and speed of a step."""
        speed = self.n_bytes / MB / seconds
        print(f"{who:>7} {what:<28} {seconds:8.2f} s {speed:8.1f} MB/s  {note}", flush=True)


def measure_ours(
    report: Report, folder: Path, content: dict[str, Any], n_workers: int
) -> tuple[float, float]:
    """Run the rules; returns the seconds of shard, embed and assign together, and of fitting the embedder."""
    peaks = dict(rules(folder, content, n_workers))
    fitting = fitting_seconds(folder / "embed.log")
    for rule in ("shard", "embed", "fit_kmeans", "assign"):
        note = f"peak {peaks[rule].total / MB:.0f} MB"
        note += f", of which fitting {fitting:.1f} s" if rule == "embed" else ""
        report.line("ours", rule, peaks[rule].seconds, note)
    seconds = sum(peaks[rule].seconds for rule in ("shard", "embed", "assign"))
    report.line("ours", "shard + embed + assign", seconds)
    return seconds, fitting


def measure_recipe(
    report: Report, folder: Path, paths: list[Path], content: dict[str, Any], k: int
) -> tuple[float, float]:
    """Run the recipe; returns the seconds of clustering and tokenising, and of fitting the embedder."""
    texts = sample(paths, content["embed"]["fit_documents"])
    began = time.perf_counter()
    embedder = recipe.fit(texts, content["embed"]["n_components"])
    fitting = time.perf_counter() - began
    centres_KD = embedder.transform(texts[:k])
    steps = recipe.run(paths, embedder, centres_KD, folder / "tokenizer/tokenizer.json")
    report.line("recipe", "fit tf-idf and SVD", fitting, f"on {len(texts)} documents")
    for step, seconds in steps.items():
        report.line("recipe", step, seconds)
    report.line("recipe", "cluster + tokenise", sum(steps.values()))
    return sum(steps.values()), fitting


def main() -> None:
    """Run the benchmark from the command line."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.workers)
    content = configured(args.k, args.tokenizer)
    if args.fit_documents:
        content["embed"] |= {"fit_documents": args.fit_documents}
    folder = Path(tempfile.mkdtemp())
    try:
        paths, n_bytes = plain_copies(args.corpus, folder, args.workers, args.demo)
        content["corpus"] |= {"train": list(map(str, paths))}
        print(f"{n_bytes / MB:.1f} MB of text, {args.workers} workers")
        report = Report(n_bytes)
        ours, our_fitting = measure_ours(report, folder, content, args.workers)
        if args.compare_ids:
            documents, tokens, other = differing(folder)
            found = f"{documents} documents, {tokens} tokens, {other} documents"
            print(f"        {found} with other ids than the reference's", flush=True)
        if not args.no_recipe:
            theirs, their_fitting = measure_recipe(report, folder, paths, content, args.k)
            without, both = theirs / (ours - our_fitting), (theirs + their_fitting) / ours
            print(f"recipe / ours, fitting on neither side: {without:.1f}")
            print(f"recipe / ours, fitting of the embedder on both sides: {both:.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
