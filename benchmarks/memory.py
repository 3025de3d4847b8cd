"""Time and peak memory of rule `shard` on corpora of different size, run as the workflow runs it.

    python benchmarks/memory.py --workers 2 --corpus small.jsonl.zst --corpus 'large-*.jsonl.zst'

Every --corpus is one corpus: files, folders or globs. A tokenizer is trained on 3 MB of the first; everything is written to a temporary
folder. Memory is the resident set, looked at 50 times a second: the peak of the rule's process, and the peak of the sum of its workers.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

ROOT = Path(__file__).parents[1]
MB = 1e6


class Peak(NamedTuple):
    """What a command needed; memory in bytes."""

    seconds: float
    cpu_seconds: float
    parent: int
    workers: int
    total: int


def measure(module: str, *args: object) -> Peak:
    """Run a module of the package and watch it and its child processes."""
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
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", required=True, action="append", nargs="+", help="one corpus; repeat the option for more")
    p.add_argument("--workers", type=int, default=2, help="worker processes of rule shard")
    args = p.parse_args()
    print(f"{'text':>9} {'documents':>9} {'seconds':>8} {'MB/s':>6} {'CPU s':>6}   peak MB: {'parent':>6} {'workers':>8} {'together':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        content = yaml.safe_load((ROOT / "config.yaml").read_text("utf-8"))
        content["tokenizer"] |= {"train_bytes": 3_000_000}
        tokenizer = folder / "tokenizer/tokenizer.json"
        for i, patterns in enumerate(args.corpus):
            content["corpus"] |= {"train": patterns}
            config = folder / f"config-{i}.json"
            config.write_text(json.dumps(content))
            if not tokenizer.exists():
                measure("tokenizer", "--config", config, "--out", tokenizer, "--log", folder / "tokenizer.log")
            manifest = folder / f"shards-{i}/manifest.json"
            peak = measure("shard", "--config", config, "--tokenizer", tokenizer, "--out", manifest, "--workers", args.workers)
            shards = json.loads(manifest.read_text("utf-8"))["shards"]
            n_bytes, n_documents = (sum(shard[key] for shard in shards) for key in ("n_bytes", "n_documents"))
            print(
                f"{n_bytes / MB:6.0f} MB {n_documents:9d} {peak.seconds:8.1f} {n_bytes / MB / peak.seconds:6.1f}"
                f" {peak.cpu_seconds:6.1f}            {peak.parent / MB:6.0f} {peak.workers / MB:8.0f} {peak.total / MB:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
