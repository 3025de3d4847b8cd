"""A corpus of token shards for tests: words of each topic, words that all topics share, and a tokenizer."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cbtm_pipeline import assign, assign_random, embed, fit_kmeans, route
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import shard_files, token_files

CONFIG = Path(__file__).parents[2] / "config.yaml"
N_COMMON, N_OWN = 20, 30  # words that every topic uses, and words of each topic alone
SEPARATOR = 0


def documents(
    n: int, n_topics: int, rng: np.random.Generator, n_words: tuple[int, int] = (5, 60)
) -> tuple[token_files.Documents, np.ndarray]:
    """n documents and their topics. A document has common words, and about as many of its topic's own."""
    topics = rng.integers(n_topics, size=n)
    texts = []
    for topic in topics:
        common = rng.integers(1, 1 + N_COMMON, size=rng.integers(*n_words))
        own = rng.integers(N_OWN, size=rng.integers(*n_words)) + 1 + N_COMMON + N_OWN * topic
        texts.append(np.concatenate([[SEPARATOR], rng.permutation(np.concatenate([common, own]))]))
    offsets = np.cumsum([0] + [len(text) for text in texts])
    values = np.concatenate([np.empty(0), *texts]).astype(np.uint16)
    return token_files.Documents(values, offsets), topics


def unit_vectors(
    n: int, d: int, n_topics: int, seed: int, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """n vectors of length one (n, d) around topics of unequal size, and token counts."""
    rng = np.random.default_rng(seed)
    topics = rng.choice(n_topics, n, p=rng.dirichlet(np.ones(n_topics)))
    x_ND = spread * rng.standard_normal((n_topics, d))[topics] + rng.standard_normal((n, d))
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32), np.ceil(
        rng.lognormal(5.5, 1, n)
    )


def words(n_topics: int) -> list[str]:
    """The vocabulary: the separator, common words, and each topic's words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    own = [
        f"{letters[t % 26]}{letters[t // 26]}word{letters[i % 26]}{letters[i // 26]}"
        for t in range(n_topics)
        for i in range(N_OWN)
    ]
    return ["<sep>", *(f"common{letters[i]}" for i in range(N_COMMON)), *own]


def write_tokenizer(folder: Path, n_topics: int) -> Path:
    """A tokenizer whose tokens are the words above."""
    model = models.WordLevel({word: i for i, word in enumerate(words(n_topics))}, unk_token="<sep>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_shards(
    folder: Path,
    shards: dict[str, token_files.Documents],
    vocabulary: list[str],
    tokenizer: Path,
    labels: dict[str, list[str]] | None = None,
) -> Path:
    """Write shards (`train-00000` ..., `eval-00000` ...) with their files; return the manifest's path.

    `labels`: those of each shard's documents, if they have any.
    """
    made_from = {"tokenizer": artifact.identity(tokenizer)}
    entries = [
        _write_shard(folder, name, docs, vocabulary, made_from, labels[name] if labels else None)
        for name, docs in shards.items()
    ]
    about = {"separator_id": SEPARATOR, "vocab_size": len(vocabulary)}
    identities = {
        f"identity_{split}": shard_files.identity_of(
            [entry for entry in entries if entry["split"] == split], about | made_from
        )
        for split in ("train", "eval")
    }
    more: dict[str, Any] = {
        "n_quarantined": 0,
        "encoder": "tokenizers",
        "files": [f"{name}{suffix}" for name in shards for suffix in (".parquet", ".arrow")],
        **identities,
    }
    made_from = {**made_from, "corpus": artifact.fingerprint(entries)}
    meta = artifact.make_meta("shards", made_from, {}, shards=entries, **about, **more)
    artifact.write_sealed(folder / "manifest.json", meta)
    return folder / "manifest.json"


def _write_shard(
    folder: Path,
    name: str,
    docs: token_files.Documents,
    vocabulary: list[str],
    made_from: dict[str, str],
    labels: list[str] | None,
) -> dict[str, Any]:
    """Write the two files of a shard; returns its entry in the manifest."""
    identities = token_files.write(folder / f"{name}.arrow", artifact.make_meta("tokens", made_from), [docs])
    ranges = zip(docs.offsets[:-1], docs.offsets[1:], strict=True)
    texts = ["".join(vocabulary[i] for i in docs.values[a + 1 : b]) for a, b in ranges]
    n_bytes = [len(text.encode()) for text in texts]
    table = pa.table(
        {
            "doc_id": pa.array([f"{name}#{i}" for i in range(len(docs))], pa.string()),
            **({"label": pa.array(labels, pa.string())} if labels is not None else {}),
            "text": pa.array(texts, pa.string()),
            "n_tokens": pa.array(docs.n_tokens, pa.int32()),
            "n_bytes": pa.array(n_bytes, pa.int64()),
        },
        metadata={"cbtm": json.dumps(artifact.make_meta("documents", made_from))},
    )
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return {
        "name": name,
        "split": name.split("-")[0],
        "n_documents": len(docs),
        "n_tokens": int(docs.n_tokens.sum()),
        "n_bytes": sum(n_bytes),
        "identity_groups": identities,
        "identity_columns": {column: column_identity(table[column]) for column in table.column_names},
        **({"n_labelled": sum(map(bool, labels))} if labels is not None else {}),
    }


def change_id(path: Path) -> None:
    """Write the Parquet file of a shard again, valid and with another id in its third row."""
    table = pq.read_table(path)
    ids = [f"{name}!" if i == 2 else name for i, name in enumerate(table["doc_id"].to_pylist())]
    pq.write_table(table.set_column(0, table.schema.field(0), [ids]), path)


def column_identity(column: pa.ChunkedArray) -> str:
    """The identity of a column of a shard, as its manifest gives it."""
    digest = shard_files.ColumnHash()
    digest.add(column)
    return digest.hexdigest()


def write(
    outdir: Path,
    n_train: list[int],
    n_eval: list[int] | None = None,
    *,
    n_topics: int = 4,
    rng_seed: int = 0,
    label: Callable[[int, int], str] | None = None,
) -> Path:
    """Write tokenizer/ and shards/ under `outdir`, and return shards/manifest.json.

    `n_train` and `n_eval` give the number of documents of each shard. `label` gives the label of a document,
    by its topic and its row.
    """
    rng = np.random.default_rng(rng_seed)
    shards, labels = {}, {}
    for split, sizes in (("train", n_train), ("eval", [3] if n_eval is None else n_eval)):
        for i, n in enumerate(sizes):
            name = f"{split}-{i:05d}"
            shards[name], topics = documents(n, n_topics, rng)
            labels[name] = [label(int(topic), row) for row, topic in enumerate(topics)] if label else []
    tokenizer = write_tokenizer(outdir / "tokenizer", n_topics)
    return write_shards(outdir / "shards", shards, words(n_topics), tokenizer, labels if label else None)


def write_config(path: Path, **sections: dict[str, Any]) -> Path:
    """The default config with some keys changed: `write_config(path, cluster={"k": 2})`."""
    content = yaml.safe_load(CONFIG.read_text("utf-8"))
    for section, keys in sections.items():
        content[section] |= keys
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def run(module: ModuleType, config: Path, *flags: str, **paths: Path) -> None:
    """Call a rule's main like its command line, and restore the logging for later tests."""
    options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    try:
        with mock.patch.object(sys, "argv", [module.__name__, "--config", str(config), *flags, *options]):
            module.main()
    finally:
        cli.log.handlers.clear()
        cli.log.propagate = True


def run_embed(outdir: Path, config: Path, *options: str) -> Path:
    out = outdir / "embed/manifest.json"
    run(embed, config, *options, shards=outdir / "shards/manifest.json", out=out)
    return out


def run_fit_kmeans(outdir: Path, config: Path) -> Path:
    inputs = {
        "vectors": "embed/manifest.json",
        "shards": "shards/manifest.json",
        "tokenizer": "tokenizer/tokenizer.json",
    }
    out = outdir / "cluster/clusterer.npz"
    run(fit_kmeans, config, **{name: outdir / path for name, path in inputs.items()}, out=out)
    return out


def run_assign(outdir: Path, config: Path, *options: str) -> Path:
    inputs = {
        "shards": "shards/manifest.json",
        "vectors": "embed/manifest.json",
        "clusterer": "cluster/clusterer.npz",
    }
    out = outdir / "assignments/manifest.json"
    run(assign, config, *options, **{name: outdir / path for name, path in inputs.items()}, out=out)
    return out


def run_assign_all(outdir: Path, config: Path) -> Path:
    """Run `embed`, `fit_kmeans` and `assign`."""
    run_embed(outdir, config)
    run_fit_kmeans(outdir, config)
    return run_assign(outdir, config)


def run_assign_random(outdir: Path, config: Path, *options: str) -> Path:
    out = outdir / "random/manifest.json"
    run(assign_random, config, *options, shards=outdir / "shards/manifest.json", out=out)
    return out


def run_route(outdir: Path, config: Path) -> Path:
    inputs = {
        "shards": "shards/manifest.json",
        "embedder": "embed/embedder.npz",
        "clusterer": "cluster/clusterer.npz",
        "tokenizer": "tokenizer/tokenizer.json",
    }
    out = outdir / "route/distances.npz"
    run(route, config, **{name: outdir / path for name, path in inputs.items()}, out=out)
    return out


def check_grouping(outdir: Path, folder: str) -> dict[str, Any]:
    """Check that each document is in its cluster's group once, in the shard's order. Returns the manifest.

    Also checks every identity in the manifest, and that it lists the files beside it. `folder` holds the
    output of `assign` or `assign_random`.
    """
    path = outdir / folder / "manifest.json"
    manifest = artifact.read_sealed(path, "assignments")
    assert sorted(manifest["files"]) == sorted(p.name for p in path.parent.iterdir() if p != path)
    k, n_documents, n_tokens = manifest["k"], np.zeros(manifest["k"], int), np.zeros(manifest["k"], int)
    identities: list[list[str]] = [[] for _ in range(k)]  # of each cluster's group in each file
    for entry in manifest["shards"]:
        name = entry["name"]
        shard = token_files.read_unverified(outdir / f"shards/{name}.arrow", 0)
        rows = pq.read_table(outdir / f"{folder}/{name}.parquet").to_pydict()
        assert rows["doc_id"] == pq.read_table(outdir / f"shards/{name}.parquet")["doc_id"].to_pylist()
        assert rows["n_tokens"] == shard.n_tokens.tolist()
        of_file = token_files.read_identities(outdir / f"{folder}/{name}.arrow", entry["identity"])
        assert len(of_file) == k
        for j in range(k):
            expected = shard.take(np.flatnonzero(np.array(rows["cluster"]) == j))
            assert of_file[j] == expected.identity
            group = token_files.read(outdir / f"{folder}/{name}.arrow", j, of_file[j])
            assert np.array_equal(group.values, expected.values)
            assert np.array_equal(group.offsets, expected.offsets)
            identities[j].append(of_file[j])
            n_documents[j] += len(group)
            n_tokens[j] += group.n_tokens.sum()
    assert manifest["identity_groups"] == [artifact.fingerprint(of_group) for of_group in identities]
    assert manifest["n_documents"] == n_documents.tolist() and manifest["n_tokens"] == n_tokens.tolist()
    largest = n_tokens.max() / n_tokens.mean()
    assert abs(manifest["load_over_mean"]["tokens"]["max"] - largest) < 1e-6 * largest
    return manifest


def tokens_record(path: Path) -> dict[str, Any]:
    """The record of a token file."""
    return artifact.from_compact(pa.ipc.open_file(path).schema.metadata[b"cbtm"])


def check_shards_are_single_groups(outdir: Path, folder: str) -> None:
    """Check that with one cluster, each shard's only group holds the shard's tokens."""
    for entry in artifact.read_sealed(outdir / folder / "manifest.json", "assignments")["shards"]:
        shard, group = (
            token_files.read_unverified(outdir / f"{f}/{entry['name']}.arrow", 0) for f in ("shards", folder)
        )
        assert np.array_equal(shard.values, group.values) and np.array_equal(shard.offsets, group.offsets)


def peak_bytes(act: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy allocate at once while `act` runs.

    It is the lower of two runs: a cache or another thread of the process may take some megabytes in one.
    """
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        try:
            act()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
