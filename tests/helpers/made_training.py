"""Small inputs of a training (tokenizer, shards, assignments, config), and trainings in this process."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

from cbtm_pipeline import config, plan, train_expert
from cbtm_pipeline.base import artifact
from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import heldout, shard_files, token_files
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import training_log
from resealed import change_json

VOCAB_SIZE, SEQ_LEN = 300, 32
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {  # one of each kind of architecture
    "llama": LLAMA,
    "llama-untied": LLAMA | {"tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {
        **{"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "qwen2": LLAMA | {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3": LLAMA | {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16},
    "smollm3": LLAMA | {"model_type": "smollm3", "num_key_value_heads": 1},
    "phi": {  # its output layer has a bias
        **{"model_type": "phi", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "tie_word_embeddings": False},
    },
}
# section run: save after every step, or not at all
NOW, NEVER = {"checkpoint_seconds": 1e-9}, {"checkpoint_seconds": 600}
CONFIG = Path(__file__).parents[2] / "config.yaml"


def make_config(
    k: int = 2,
    scratch: dict[str, Any] = LLAMA,
    pretrained: str | None = None,
    revision: str | None = None,
    run: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """The default config for a tiny model: 10 steps of 4 sequences for each expert."""
    content = config.read(CONFIG).model_dump()
    content["cluster"]["k"] = k
    content["model"] |= {"pretrained": pretrained, "preset": None, "scratch": scratch, "revision": revision}
    content["train"] |= {
        "seq_len": SEQ_LEN,
        "batch_size": 4 * k,
        "steps": 10,
        "seed_batch_size": 4,
        "micro_batch_size": 4,
        "seed_share": 0.2,
        "validations": 0,
        "compile": False,
    }
    content["train"] |= {"precision": "float32", "lr": 0.01, "final_lr_ratio": 0.1} | train
    content["eval"] |= {"stride": 16, "max_document_tokens": None}
    content["run"] |= run or {}
    return config.validate(content)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 300 words, the separator first, with the files that the rule writes."""
    vocabulary = {"<sep>": 0} | {f"w{i}": i for i in range(1, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<sep>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<sep>",
        "eos_token": "<sep>",
        "unk_token": "<sep>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    files = {path.name: artifact.identity(path) for path in folder.iterdir()}
    about = {"separator_id": 0, "vocab_size": VOCAB_SIZE, "files": files, "identity": files["tokenizer.json"]}
    artifact.write_sealed(folder / "card.json", artifact.make_meta("tokenizer", {}, {}, **about))


def documents(n: int, rng: np.random.Generator, longest: int = 80) -> token_files.Documents:
    """n documents of 1 to `longest` tokens.

    Each is a walk along neighbouring words, so that a model can learn something.
    """
    lengths = rng.integers(1, longest + 1, n)
    texts = [
        np.r_[0, 1 + (rng.integers(299) + np.cumsum(rng.integers(0, 3, length))) % 299] for length in lengths
    ]
    return token_files.Documents(np.concatenate(texts).astype(np.uint16), np.cumsum([0, *map(len, texts)]))


def write_corpus(
    outdir: Path, n_train: tuple[int, ...] = (40, 30), longest: int = 80, n_held_out: int = 12
) -> None:
    """Write tokenizer/, shards/ and the groups of their documents.

    assignments/ and random/ have two groups (every third document; the others), one/ has one.
    """
    rng = np.random.default_rng(0)
    write_tokenizer(outdir / "tokenizer")
    train = {f"train-{i:05d}": documents(n, rng, longest) for i, n in enumerate(n_train)}
    shards = write_shards(outdir, train, n_held_out)
    for folder, k, clusterer in (("assignments", 2, "c" * 32), ("one", 1, "d" * 32)):
        write_assignments(
            outdir / folder, train, k, {**made_from.assign_random(shards), "clusterer": clusterer}
        )
    write_assignments(outdir / "random", train, 2, made_from.assign_random(shards))


def write_shards(outdir: Path, train: dict[str, token_files.Documents], n_held_out: int) -> dict[str, Any]:
    """Write shards/ with these training documents and some held-out ones; return the manifest."""
    tokenizer = {"tokenizer": artifact.identity(outdir / "tokenizer/tokenizer.json")}
    shards = train | {"eval-00000": documents(n_held_out, np.random.default_rng(n_held_out))}
    entries = [_write_shard(outdir / "shards", name, shard, tokenizer) for name, shard in shards.items()]
    about = {"separator_id": 0, "vocab_size": VOCAB_SIZE}
    identities = {
        f"identity_{split}": shard_files.identity_of(
            [e for e in entries if e["split"] == split], tokenizer | about
        )
        for split in ("train", "eval")
    }
    more = {"n_quarantined": 0, "encoder": "tokenizers", "files": [f"{name}.arrow" for name in shards]}
    origin = {**tokenizer, "corpus": artifact.fingerprint(entries)}
    meta = artifact.make_meta("shards", origin, {}, shards=entries, **about, **identities, **more)
    artifact.write_sealed(outdir / "shards/manifest.json", meta)
    return artifact.read_sealed(outdir / "shards/manifest.json", "shards")


def _write_shard(
    folder: Path, name: str, shard: token_files.Documents, tokenizer: dict[str, str]
) -> dict[str, Any]:
    """Write the tokens of a shard, and the ids of held-out documents; return its entry in the manifest."""
    identities = token_files.write(folder / f"{name}.arrow", artifact.make_meta("tokens", tokenizer), [shard])
    ids = pa.table({"doc_id": [f"d{i}" for i in range(len(shard))]})
    column = shard_files.ColumnHash()
    column.add(ids["doc_id"])
    if name.startswith("eval"):
        pq.write_table(ids, folder / f"{name}.parquet")
    n_tokens = int(shard.n_tokens.sum())
    sizes = {"n_documents": len(shard), "n_tokens": n_tokens, "n_bytes": 4 * n_tokens}
    hashes = {"identity_groups": identities, "identity_columns": {"doc_id": column.hexdigest()}}
    return {"name": name, "split": name.split("-")[0], **sizes, **hashes}


def write_assignments(
    folder: Path, shards: dict[str, token_files.Documents], k: int, origin: dict[str, str]
) -> None:
    """Write the groups of these shards, and their manifest. There are no validation documents."""
    n_documents, n_tokens = np.zeros(k, int), np.zeros(k, int)
    entries, identities = [], []
    for name, shard in shards.items():
        labels = np.minimum(np.arange(len(shard)) % 3, k - 1)
        groups = [shard.take(np.flatnonzero(labels == j)) for j in range(k)]
        meta = artifact.make_meta("tokens", origin)
        identities.append(token_files.write(folder / f"{name}.arrow", meta, groups))
        entries.append({"name": name, "identity": artifact.fingerprint(identities[-1])})
        n_documents += [len(group) for group in groups]
        n_tokens += [group.n_tokens.sum() for group in groups]
    content = {
        "shards": entries,
        "k": k,
        "n_documents": n_documents.tolist(),
        "n_tokens": n_tokens.tolist(),
        "identity_groups": [artifact.fingerprint(list(group)) for group in zip(*identities, strict=True)],
        "identity_validation": None,
        "files": [f"{name}.arrow" for name in shards],
    }
    artifact.write_sealed(folder / "manifest.json", artifact.make_meta("assignments", origin, {}, **content))


def write_validation(outdir: Path) -> None:
    """Add validation documents to assignments/: all held-out documents but one."""
    shards, out = outdir / "shards/manifest.json", outdir / "assignments/manifest.json"
    chosen = heldout.select_validation(shards, artifact.read_sealed(shards, "shards"), 1.0, 0)
    found = heldout.read_validation(shards, chosen)
    labels = [np.arange(len(d)) % 2 for d in found]
    origin = artifact.read_sealed(out, "assignments")["made_from"]
    change_json(out, identity_validation=heldout.write_validation(out, found, labels, 2, origin))


def write_empty_cluster(outdir: Path) -> Path:
    """Assignments of two clusters, the second without documents; return their manifest."""
    shards = artifact.read_sealed(outdir / "shards/manifest.json", "shards")
    origin = {**made_from.assign_random(shards), "clusterer": "e" * 32}
    write_assignments(outdir / "empty", {"train-00000": documents(1, np.random.default_rng(0))}, 2, origin)
    return outdir / "empty/manifest.json"


def files(outdir: Path, name: str, data: str | None = None, to: str = "experts") -> train_expert.Files:
    """The paths that the workflow would use. `data` is another folder of data, `to` one of experts."""
    folders = {"corpus": "shards", "clusters": "assignments", "parents": "assignments", "random": "random"}
    folder = data or folders[plan.data_of(name)[0]]
    return train_expert.Files(
        data=outdir / folder / "manifest.json",
        tokenizer=outdir / "tokenizer/tokenizer.json",
        seed_model=None if not plan.branches(name) else outdir / "experts/seed/model.safetensors",
        out=outdir / to / name / "model.safetensors",
        work=outdir / "work" / to / name,
    )


def place(outdir: Path, name: str) -> train_expert.Files:
    """Paths of expert 0 in a folder of its own, work/ included."""
    root = outdir / name
    return files(outdir, "0")._replace(out=root / "experts/0/model.safetensors", work=root / "work/0")


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """The lines that the project logs inside this context."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, handler = logging.getLogger("cbtm"), Handler()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def train(
    cfg: Config, where: train_expert.Files, name: str, stop: Callable[[], Any] = lambda: False
) -> bytes:
    """Train in this process; return the bytes of the weights, none if the training was stopped."""
    finished = train_expert.train_and_publish(plan.train_expert(cfg, name), cfg.run, where, stop)
    return where.out.read_bytes() if finished else b""


def write_seed(outdir: Path) -> None:
    """Write a small corpus, and train a seed model on it."""
    train_expert.make_deterministic(1)
    write_corpus(outdir)
    train(make_config(), files(outdir, "seed"), "seed")


def stop_after(n_steps: int) -> Callable[[], bool]:
    """A `stop` that stops a training after so many steps."""
    calls = itertools.count(1)
    return lambda: next(calls) >= n_steps


def check_published(where: train_expert.Files, n_steps: int) -> None:
    """Check that the folder is complete, its log has each step once, and no temporary file is left."""
    expert_files.read_card(where.out)
    assert [row["step"] for row in training_log.read(where.out.with_name("metrics.jsonl"))] == list(
        range(1, n_steps + 1)
    )
    assert not (where.work / "state").exists()
    left_over = [
        path.name for path in [*where.out.parent.rglob(".*"), *where.work.rglob(".*")] if path.name != ".lock"
    ]
    assert left_over == []
