"""What verification costs: the share of each rule's time that goes into hashes, and seconds per gigabyte.

    python benchmarks/verify.py --corpus 'texts/*.jsonl.zst'

Runs the rules from text to clusters, then the seed, one expert and its scores, each in a process of its own
with one thread, and counts the processor time inside every function that hashes. Without --corpus, the
built-in demo corpus is read.

Cost model: blake2b hashes about 1 GB/s on one core. shard hashes what it reads (1 byte per byte of text, less
if compressed) and what it writes (0.62 ids, 1 text). Each later rule hashes the bytes that it reads, once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from growth import ROOT, configured

COUNT = """
import atexit, importlib, json, sys, time
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import shard_files, token_files

spent, n_bytes, depth = 0.0, 0, 0

def counted(function, size):
    def call(*args, **kwargs):
        global spent, n_bytes, depth
        depth += 1
        began = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1
            if not depth:
                spent += time.thread_time() - began
                n_bytes += size(*args)
    return call

artifact.identity = counted(artifact.identity, lambda path: __import__("os").stat(path).st_size)
artifact.hash_of = counted(artifact.hash_of, len)
artifact._hash_up_to = counted(artifact._hash_up_to, lambda file, n: n)
Documents = token_files.Documents
Documents.identity = property(counted(Documents.identity.fget, lambda d: d.values.nbytes))
shard_files.ColumnHash.add = counted(shard_files.ColumnHash.add, lambda self, column: column.nbytes)
module, sys.argv = importlib.import_module(sys.argv[1]), sys.argv[1:]
began = time.monotonic()
module.main()
print(json.dumps([time.monotonic() - began, spent, n_bytes]))
"""


def measure(rule: str, *arguments: object) -> tuple[float, float, int]:
    """Seconds of a rule, seconds of them in hashes, and bytes hashed."""
    command = [sys.executable, "-c", COUNT, f"cbtm_pipeline.{rule}", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    seconds, spent, n_bytes = json.loads(run.stdout.splitlines()[-1])
    return seconds, spent, n_bytes


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """The arguments of each rule, in order."""
    tokenizer, shards = folder / "tokenizer/tokenizer.json", folder / "shards/manifest.json"
    vectors, clusterer = folder / "embed/manifest.json", folder / "cluster/clusterer.npz"
    assignments, seed = folder / "assignments/manifest.json", folder / "experts/seed/model.safetensors"
    both = ("--shards", shards, "--vectors", vectors)
    train = ("--tokenizer", tokenizer, "--work")
    return {
        "tokenizer": ("--out", tokenizer),
        "shard": ("--tokenizer", tokenizer, "--out", shards),
        "embed": ("--shards", shards, "--out", vectors),
        "fit_kmeans": (*both, "--tokenizer", tokenizer, "--out", clusterer),
        "assign": (*both, "--clusterer", clusterer, "--out", assignments),
        "train_expert seed": ("--expert", "seed", "--data", shards, *train, folder / "work/s", "--out", seed),
        "train_expert 0": (
            *("--expert", "0", "--data", assignments, *train, folder / "work/0", "--seed-model", seed),
            *("--out", folder / "experts/0/model.safetensors"),
        ),
        "score_expert 0": (
            *("--expert-weights", folder / "experts/0/model.safetensors", "--shards", shards),
            *("--out", folder / "scores/0.npz"),
        ),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", nargs="+", default=["builtin:demo"], help="files, folders or globs")
    p.add_argument("--steps", type=int, default=20, help="training steps of an expert")
    args = p.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = configured(4, None)
        content |= {"outdir": name}
        content["corpus"] |= {"train": args.corpus}
        content["train"] |= {"steps": args.steps}
        (folder / "config.json").write_text(json.dumps(content))
        demo = folder / "demo/corpus.jsonl.zst"
        if args.corpus == ["builtin:demo"]:
            measure("demo_corpus", "--out", demo)
        print(f"{'rule':<18} {'seconds':>8} {'hashing':>8} {'share':>7} {'MB':>8} {'s/GB':>6}")
        for rule, arguments in commands(folder).items():
            needs_demo = ("--demo", demo) if demo.exists() and rule in ("tokenizer", "shard") else ()
            config = ("--config", folder / "config.json")
            seconds, spent, n_bytes = measure(rule.split()[0], *config, *arguments, *needs_demo)
            per_gb = spent / n_bytes * 1e9 if n_bytes else 0.0
            share, size = f"{spent / seconds:.1%}", f"{n_bytes / 1e6:.1f}"
            print(f"{rule:<18} {seconds:8.2f} {spent:8.3f} {share:>7} {size:>8} {per_gb:6.2f}")


if __name__ == "__main__":
    main()
