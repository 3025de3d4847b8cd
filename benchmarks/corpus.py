"""The corpus path, from text to the token shards of every cluster: ours and the published recipe, in one run on the same text and cores.

    python benchmarks/corpus.py --corpus 'texts/*.jsonl.zst' --tokenizer folder/with/tokenizer --compare-ids

Ours are the rules as the workflow runs them: processes that start, read, check, write and fsync. The recipe (benchmarks/recipe.py) gets its
text as plain JSON lines, one process per core, and its embedder in memory. Fitting the embedder and k-means is shown apart for both: it is
done on a sample, so that its time does not grow with the corpus. Without --corpus the built-in demo corpus is read.

Cost model of ours, per document byte of English text with 50 000 tokens in the vocabulary (0.31 tokens): shard reads 1 byte, encodes it
and writes 0.62 (ids) + 0.47 (lz4 text); embed reads 0.62 and 125 of E, mostly from the cache (400 a token), and writes 0.1 (400 a
document); assign reads 0.72 and writes 0.62.
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

import numpy as np
import recipe
import tokenizers
from growth import MB, ROOT, configured, rules

from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus import token_files

COMPARED_AT_ONCE = 1000  # documents


def plain_copies(patterns: list[str], folder: Path, n_files: int, demo: Path) -> tuple[list[Path], int]:
    """The corpus as so many plain JSON-lines files of about one size, and its bytes of text.

    A document whose id came before is left out: ours would have to write its shard again, and the recipe does not look for any.
    """
    paths = [folder / f"text-{i}.jsonl" for i in range(n_files)]
    files = [path.open("wb") for path in paths]
    total, ids = 0, set[str]()
    for part in corpus_blocks.parts(
        corpus_files.name(corpus_files.input_files(patterns, demo)), 1 << 23, "text", "id", "file"
    ):
        for row in corpus_rows.read(part, "text", "id"):
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
    """How long rule embed took to fit its embedder, as its log says."""
    found = re.search(r"fitted on \d+ documents in ([\d.]+) s", log.read_text("utf-8"))
    assert found, log
    return float(found[1])


def differing(folder: Path) -> tuple[int, int, int]:
    """Documents, tokens, and documents whose ids are not the reference tokenizer's, over all shards."""
    import pyarrow.parquet as pq

    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    reference.encode_special_tokens = True
    n_documents = n_tokens = n_differ = 0
    for path in sorted((folder / "shards").glob("*.arrow")):
        documents, start = token_files.read(path, 0), 0
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
    """About n texts, evenly from all files."""

    def lines() -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                yield from file

    n_documents = sum(1 for _ in lines())
    every = max(1, n_documents // n)
    return [json.loads(line)["text"] for i, line in enumerate(lines()) if i % every == 0][:n]


def main() -> None:
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
    p.add_argument("--no-recipe", action="store_true", help="ours alone")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.workers)
    content = configured(args.k, args.tokenizer)
    if args.fit_documents:
        content["embed"] |= {"fit_documents": args.fit_documents}

    folder = Path(tempfile.mkdtemp())
    try:
        paths, n_bytes = plain_copies(args.corpus, folder, args.workers, args.demo)
        content["corpus"] |= {"train": list(map(str, paths))}
        print(f"{n_bytes / MB:.1f} MB of text, {args.workers} workers")

        def say(who: str, what: str, seconds: float, note: str = "") -> None:
            print(
                f"{who:>7} {what:<28} {seconds:8.2f} s {n_bytes / MB / seconds:8.1f} MB/s  {note}", flush=True
            )

        peaks = dict(rules(folder, content, args.workers))
        fitting = fitting_seconds(folder / "embed.log")
        for rule in ("shard", "embed", "fit_kmeans", "assign"):
            note = f"peak {peaks[rule].total / MB:.0f} MB" + (
                f", of which fitting {fitting:.1f} s" if rule == "embed" else ""
            )
            say("ours", rule, peaks[rule].seconds, note)
        path = sum(peaks[rule].seconds for rule in ("shard", "embed", "assign"))
        say("ours", "shard + embed + assign", path)
        if args.compare_ids:
            print(
                "        {} documents, {} tokens, {} documents with other ids than the reference's".format(
                    *differing(folder)
                ),
                flush=True,
            )
        if not args.no_recipe:
            texts = sample(paths, content["embed"]["fit_documents"])
            began = time.perf_counter()
            embedder = recipe.fit(texts, content["embed"]["n_components"])
            theirs_fitting = time.perf_counter() - began
            centres_KD = embedder.transform(texts[: args.k])
            theirs = recipe.run(paths, embedder, centres_KD, folder / "tokenizer/tokenizer.json")
            say("recipe", "fit tf-idf and SVD", theirs_fitting, f"on {len(texts)} documents")
            for step, seconds in theirs.items():
                say("recipe", step, seconds)
            total = sum(theirs.values())
            say("recipe", "cluster + tokenise", total)
            print(f"recipe / ours, fitting on neither side: {total / (path - fitting):.1f}")
            print(
                f"recipe / ours, fitting of the embedder on both sides: {(total + theirs_fitting) / path:.1f}"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
