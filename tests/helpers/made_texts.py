"""Artificial corpora as files, and helpers to run `tokenizer` and `shard` on them."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from cbtm_pipeline import config, plan, tokenizer
from cbtm_pipeline.corpus import content

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "of",
    "a",
    "ship",
    "rose",
    "butter",
    "anchor",
    "garden",
    "flour",
    "sail",
    "soil",
    "sugar",
    "tide",
    "leaf",
    "dough",
    "wave",
]


def texts(n: int, rng_seed: int = 0) -> list[str]:
    """n different documents."""
    rng = random.Random(rng_seed)
    return [
        f"Document {rng_seed}-{i}: {' '.join(rng.choices(WORDS, k=rng.randint(3, 80)))}." for i in range(n)
    ]


def rows(n: int, rng_seed: int = 0) -> list[dict[str, Any]]:
    """n different documents with ids."""
    return [{"id": f"{rng_seed}-{i}", "text": text} for i, text in enumerate(texts(n, rng_seed))]


def write_jsonl(path: Path, content: Iterable[Any]) -> Path:
    """Write rows; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in content)
    )
    return path


def write_config(path: Path, **sections: dict[str, Any]) -> Path:
    """Write the default config with some keys changed, and the folder `results` beside it as outdir."""
    changed = changed_content(**sections) | {"outdir": str(path.with_name("results"))}
    config.validate(changed)
    path.write_text(json.dumps(changed))
    return path


def changed_config(**sections: dict[str, Any]) -> config.Config:
    """The default config with some keys changed."""
    return config.validate(changed_content(**sections))


def changed_content(**sections: dict[str, Any]) -> dict[str, Any]:
    """The content of the default config with some keys changed."""
    found = yaml.safe_load((ROOT / "config.yaml").read_text())
    for name, changes in sections.items():
        found[name] |= changes
    return found


def tokenizer_plan(**sections: dict[str, Any]) -> plan.TokenizerPlan:
    """The plan of rule `tokenizer` for the default config with some keys changed."""
    return plan.tokenizer(changed_config(**sections))


def shard_plan(**corpus: Any) -> plan.ShardPlan:
    """The plan of rule `shard` for the default config with some keys of its section corpus changed."""
    return plan.shard(changed_config(corpus=corpus))


def make_tokenizer(folder: Path) -> Path:
    """A small tokenizer trained on made documents; returns its tokenizer.json."""
    corpus = write_jsonl(folder / "for-tokenizer.jsonl", rows(300, 99))
    how = tokenizer_plan(corpus={"train": [str(corpus)]}, tokenizer={"vocab_size": 320})
    tokenizer.make(how, folder / "tokenizer/tokenizer.json", None, folder / content.SEEN)
    return folder / "tokenizer/tokenizer.json"


def run(module: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module as the workflow does."""
    return subprocess.run(
        [sys.executable, "-m", f"cbtm_pipeline.{module}", *map(str, args)],
        capture_output=True,
        text=True,
        **options,
    )


def start(module: str, *args: object) -> subprocess.Popen[str]:
    """Start a module without waiting for its end."""
    command = [sys.executable, "-m", f"cbtm_pipeline.{module}", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
