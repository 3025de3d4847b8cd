"""Measure time and peak memory of the rules shard, embed, fit_kmeans and assign on corpora of different size.

    python benchmarks/growth.py --workers 2 --corpus small.jsonl.zst --corpus 'large-*.jsonl.zst'

The rules run as in the workflow and write to a temporary folder. Every --corpus is one corpus: files, folders
or globs. Memory is the resident set, read 50 times a second: the peak of the rule's process, and the peak of
the sum of its workers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

ROOT = Path(__file__).parents[1]
MB = 1e6


class Peak(NamedTuple):
    """The resources that a command took; memory in bytes."""

    seconds: float
    cpu_seconds: float
    parent: int
    workers: int
    total: int


def measure(module: str, *args: object) -> Peak:
    """Run a module of the package and measure it and its child processes."""
    began, used = time.monotonic(), _cpu_seconds()
    run = subprocess.Popen([sys.executable, "-m", f"cbtm_pipeline.{module}", *map(str, args)])
    process = psutil.Process(run.pid)
    parent = workers = total = 0
    while run.poll() is None:
        try:
            own = process.memory_info().rss
            of_children = sum(child.memory_info().rss for child in process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
        parent, workers, total = max(parent, own), max(workers, of_children), max(total, own + of_children)
        time.sleep(0.02)
    if run.returncode:
        sys.exit(run.returncode)
    return Peak(time.monotonic() - began, _cpu_seconds() - used, parent, workers, total)


def _cpu_seconds() -> float:
    """The processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rules(folder: Path, content: dict[str, Any], n_workers: int) -> Iterator[tuple[str, Peak]]:
    """Run the rules from tokenizer to assign, and yield each rule's name and peak.

    Their outputs and logs stay in `folder`.
    """
    config = folder / "config.json"
    config.write_text(json.dumps(content))
    tokenizer, shards = folder / "tokenizer/tokenizer.json", folder / "shards/manifest.json"
    vectors, clusterer = folder / "embed/manifest.json", folder / "cluster/clusterer.npz"
    both = ("--shards", shards, "--vectors", vectors)
    for rule, arguments in {
        "tokenizer": ("--out", tokenizer),
        "shard": ("--tokenizer", tokenizer, "--workers", n_workers, "--out", shards),
        "embed": ("--shards", shards, "--threads", n_workers, "--out", vectors),
        "fit_kmeans": (*both, "--tokenizer", tokenizer, "--out", clusterer),
        "assign": (
            *both,
            "--clusterer",
            clusterer,
            "--threads",
            n_workers,
            "--out",
            folder / "assignments/manifest.json",
        ),
    }.items():
        yield rule, measure(rule, "--config", config, "--log", folder / f"{rule}.log", *arguments)


def configured(k: int, tokenizer: str | None) -> dict[str, Any]:
    """config.yaml with k clusters and this tokenizer; None: one of 16 384 tokens, trained on 20 MB."""
    content = yaml.safe_load((ROOT / "config.yaml").read_text("utf-8"))
    content["cluster"] |= {"k": k}
    content["tokenizer"] |= {
        "pretrained": tokenizer and str(Path(tokenizer).absolute()),
        "vocab_size": 16384,
        "train_bytes": 20_000_000,
    }
    content["corpus"] |= {"eval_fraction": 0.02}
    return content


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--corpus", required=True, action="append", nargs="+", help="one corpus; repeat the option for more"
    )
    p.add_argument(
        "--tokenizer",
        help="folder with tokenizer.json; without it, one of 16 384 tokens is trained on each corpus",
    )
    p.add_argument("--workers", type=int, default=2, help="processes and threads")
    p.add_argument("--k", type=int, default=16, help="number of clusters")
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.workers)
    columns = f"{'text':>9} {'documents':>9} {'rule':>10} {'seconds':>8} {'MB/s':>6} {'CPU s':>6}"
    print(f"{columns}   peak MB: parent  workers together")
    for patterns in args.corpus:
        with tempfile.TemporaryDirectory() as temporary:
            content = configured(args.k, args.tokenizer)
            content["corpus"] |= {"train": patterns}
            for rule, peak in rules(Path(temporary), content, args.workers):
                if rule == "tokenizer":
                    continue
                entries = json.loads((Path(temporary) / "shards/manifest.json").read_text("utf-8"))["shards"]
                n_bytes, n_documents = (
                    sum(shard[key] for shard in entries) for key in ("n_bytes", "n_documents")
                )
                print(
                    f"{n_bytes / MB:6.0f} MB {n_documents:9d} {rule:>10} {peak.seconds:8.1f}"
                    f" {n_bytes / MB / peak.seconds:6.1f} {peak.cpu_seconds:6.1f}           "
                    f" {peak.parent / MB:6.0f} {peak.workers / MB:8.0f} {peak.total / MB:8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
