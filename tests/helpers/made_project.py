"""A small project folder. The real workflow runs in it from end to end in a minute."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TOPICS = {
    "kitchen": "butter flour oven sugar whisk dough simmer onion garlic pepper roast bake stir pan salt",
    "harbour": "ship anchor mast sail captain tide deck rope cargo crew wave storm port helm compass",
    "garden": "rose soil seed prune water bloom leaf root spade worm compost hedge lawn petal stem",
}
# A model that trains in a second, and all controls.
SMALL = {
    "corpus": {"train": ["corpus.jsonl"], "eval_fraction": 0.3, "shard_bytes": 4096},
    "tokenizer": {"vocab_size": 300},
    "embed": {"n_components": 8},
    "cluster": {"k": 2, "n_init": 2},
    "model": {
        "scratch": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        }
    },
    "train": {
        "seq_len": 32,
        "batch_size": 4,
        "steps": 4,
        "seed_batch_size": 2,
        "micro_batch_size": 2,
        "controls": ["dense-steps", "random"],
    },
    "route": {"top_k": [1, 2], "temperature": [0.1, 1.0], "epsilon": [0.01], "beta": [1.0]},
    "eval": {"stride": 16, "bootstrap": 200},
    "run": {"checkpoint_seconds": 0.001},
}


def write_corpus(path: Path, n_documents: int = 90, rng_seed: int = 0) -> None:
    """Write documents with the keys id, text and domain. Each is a bag of words of one of three topics."""
    rng = random.Random(rng_seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_documents):
            topic = rng.choice(sorted(TOPICS))
            words = rng.choices(TOPICS[topic].split(), k=rng.randint(20, 60))
            file.write(
                json.dumps({"id": f"{topic}-{i}", "text": " ".join(words) + f" {i}.", "domain": topic}) + "\n"
            )


def make_project(folder: Path, **sections: dict) -> Path:
    """A folder with a small corpus, the default config, small.yaml, links to the workflow and the profiles.

    `sections` change keys of small.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("workflow", "profiles", "config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    write_corpus(folder / "corpus.jsonl")
    content = {key: {**value, **sections.get(key, {})} for key, value in SMALL.items()}
    content |= {key: value for key, value in sections.items() if key not in content}
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder


def snakemake_command(*args: str, configfiles: Sequence[str] = ("small.yaml",)) -> list[str]:
    return [sys.executable, "-m", "snakemake", *args, "--configfile", *configfiles]


def snakemake(folder: Path, *args: str, configfiles: Sequence[str] = ("small.yaml",), ok: bool = True) -> str:
    """Run Snakemake in `folder` and return what it printed. With `ok`, it has to succeed."""
    run = subprocess.run(
        snakemake_command(*args, configfiles=configfiles),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert not ok or run.returncode == 0, run.stdout
    assert ok or run.returncode != 0, run.stdout
    return run.stdout


def done(printed: str) -> list[str]:
    """The jobs that a run says are done, in order: rule names, for experts `rule expert`."""
    return re.findall(r"^\S+ I (\S+(?: \S+)?) +done in", printed, re.M)
