"""Write every shard's tokens again, grouped by cluster: what `assign` and `assign_random` share.

Memory holds a few shards, whatever the size of the corpus.

Shapes: N documents of a shard, K clusters.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_pipeline.base import artifact, cli, parallel
from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.corpus import heldout, shard_files, token_files


class Shard(NamedTuple):
    """A shard's entry in the manifest, its documents and their names."""

    entry: shard_files.Entry
    documents: token_files.Documents
    doc_ids: list[str]


class Labels(NamedTuple):
    """The cluster of each document (int32), and its squared distance to the centre (None for random clusters)."""

    labels_N: np.ndarray
    d2_N: np.ndarray | None


class Grouping(NamedTuple):
    """How documents find their cluster. `label` is called once for each shard, in the order of the shards.

    `made_from` and `about` (balance, prices) go into the manifest.
    """

    label: Callable[[Shard], Labels]
    k: int
    made_from: dict[str, str]
    about: dict[str, Any]


def weights(n_tokens_N: np.ndarray, balance: str) -> np.ndarray:
    """What each document weighs in the balance: its tokens (at least one) or 1."""
    return np.maximum(n_tokens_N, 1) if balance == "tokens" else np.ones(len(n_tokens_N))


class Totals:
    """Sums over all documents labelled so far, by cluster."""

    def __init__(self, k: int, balance: str):
        self.balance = balance
        self.n_documents_K, self.n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
        self.loads_K, self.inertia_K = np.zeros(k), np.zeros(k)

    def add(self, n_tokens_N: np.ndarray, labels: Labels) -> None:
        """Count the documents of a shard."""
        k = len(self.n_documents_K)
        self.n_documents_K += np.bincount(labels.labels_N, minlength=k)
        self.n_tokens_K += np.bincount(labels.labels_N, n_tokens_N, k).astype(np.int64)
        if labels.d2_N is not None:
            weights_N = weights(n_tokens_N, self.balance)
            self.loads_K += np.bincount(labels.labels_N, weights_N, k)
            self.inertia_K += np.bincount(labels.labels_N, weights_N * labels.d2_N, k)

    def check(self) -> None:
        """Raise ValueError if a cluster is empty."""
        if not self.n_tokens_K.all():
            empty = np.flatnonzero(self.n_tokens_K == 0)
            raise ValueError(
                f"cluster.k: {len(self.n_tokens_K)}, of which cluster {empty[0]} and {len(empty) - 1} more are empty. "
                "Expected documents in each. Lower cluster.k, or raise cluster.fit_documents."
            )

    def content(self) -> dict[str, Any]:
        """What the manifest says of the clusters' sizes."""
        sizes = {"documents": self.n_documents_K, "tokens": self.n_tokens_K}
        over_mean = {
            what: {"max": float(n_K.max() / n_K.mean()), "min": float(n_K.min() / n_K.mean())}
            for what, n_K in sizes.items()
        }
        cli.log.info(
            "documents per cluster %s, tokens %s", self.n_documents_K.tolist(), self.n_tokens_K.tolist()
        )
        largest = over_mean["documents"]["max"], over_mean["tokens"]["max"]
        cli.log.info("largest cluster over mean: %.3f in documents, %.3f in tokens", *largest)
        n = {"n_documents": self.n_documents_K.tolist(), "n_tokens": self.n_tokens_K.tolist()}
        return {**n, "load_over_mean": over_mean}


def write(
    shards: Path,
    train: list[shard_files.Entry],
    out: Path,
    grouping: Grouping,
    validation: tuple[list[token_files.Documents], list[np.ndarray]],
    n_threads: int,
) -> None:
    """Group and write all training shards and the validation documents beside `out`, and `out` (manifest.json) last.

    `validation` holds documents and their labels, shard by shard. Raises ValueError if a cluster ends up empty.
    Labels are made in the order of the shards. The threads do what costs time: reading, regrouping, hashing, writing.
    """
    k, made_from, about = grouping.k, grouping.made_from, grouping.about
    totals = Totals(k, about["balance"])
    progress = cli.Progress("assigned", sum(entry["n_documents"] for entry in train), "documents")

    def read(entry: shard_files.Entry) -> Shard:
        doc_ids = shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist()
        return Shard(entry, shard_files.documents(shards.parent, entry), doc_ids)

    def label_in_order(read_shards: Iterable[Shard]) -> Iterator[tuple[Shard, Labels]]:
        for shard in read_shards:
            labels = grouping.label(shard)
            totals.add(shard.documents.n_tokens, labels)
            yield shard, labels

    def write_one(work: tuple[Shard, Labels]) -> dict[str, str]:
        shard, labels = work
        name = shard.entry["name"]
        write_shard(out.parent, shard, labels, k, made_from)
        return {"name": name, "identity_tokens": artifact.identity(out.with_name(f"{name}.arrow"))}

    with ThreadPoolExecutor(n_threads) as pool:
        work = label_in_order(parallel.in_order(pool, read, train, n_threads))
        written = []
        for entry, done in zip(train, parallel.in_order(pool, write_one, work, n_threads), strict=True):
            written.append(done)
            progress.add(entry["n_documents"])
    totals.check()
    content = {"shards": written, "k": k, **totals.content(), **about}
    if "prices_K" in about:
        gap = kmeans.duality_gap(totals.loads_K, np.array(about["prices_K"]), float(totals.inertia_K.sum()))
        cli.log.info(
            "duality gap %.2g: no assignment with loads like these lowers the inertia by a larger share", gap
        )
        content["duality_gap"] = gap
    documents, labels = validation
    content["identity_validation"] = None
    if documents:
        heldout.write_validation(out, documents, labels, k, made_from)
        content["identity_validation"] = artifact.identity(out.with_name(heldout.VALIDATION_FILE))
    artifact.write_json(out, artifact.make_meta("assignments", made_from, **content))


def write_shard(folder: Path, shard: Shard, labels: Labels, k: int, made_from: dict[str, str]) -> None:
    """Write a shard's Parquet file and its token file.

    Rows of the Parquet file are those of the shard. The token file has k groups, each in the order of the shard.
    """
    labels_N, d2_N = labels
    columns = {
        "doc_id": pa.array(shard.doc_ids, pa.string()),
        "cluster": pa.array(labels_N, pa.int32()),
        "n_tokens": pa.array(shard.documents.n_tokens, pa.int32()),
        "d2": pa.nulls(len(labels_N), pa.float32()) if d2_N is None else pa.array(d2_N, pa.float32()),
    }
    record = json.dumps(artifact.make_meta("assignments", made_from), sort_keys=True)
    meta: dict[bytes | str, bytes | str] = {"cbtm": record}
    with artifact.publish(folder / f"{shard.entry['name']}.parquet") as tmp:
        pq.write_table(pa.table(columns).replace_schema_metadata(meta), tmp, compression="zstd")
    groups = (shard.documents.take(np.flatnonzero(labels_N == j)) for j in range(k))
    path = folder / f"{shard.entry['name']}.arrow"
    token_files.write(path, artifact.make_meta("tokens", made_from), groups)
