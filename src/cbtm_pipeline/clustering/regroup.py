"""Write every shard's tokens again, grouped by cluster: the code that `assign` and `assign_random` share.

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
from cbtm_pipeline.corpus import heldout, labels, shard_files, token_files
from cbtm_pipeline.embedding import encoder, tfidf
from cbtm_pipeline.embedding import vectors as vector_files


class Shard(NamedTuple):
    """A shard's entry in the manifest, its documents, their ids, and their labels if these are read."""

    entry: shard_files.Entry
    documents: token_files.Documents
    doc_ids: list[str]
    labels: list[str] | None = None


class Labels(NamedTuple):
    """The cluster of each document (int32), and d2 to its centre (None for random clusters).

    With soft borders also the cluster that it is lent to, or -1.
    """

    labels_N: np.ndarray
    d2_N: np.ndarray | None
    lent_N: np.ndarray | None = None


class Grouping(NamedTuple):
    """The rule that gives documents to clusters.

    `label` is called once for each shard, in the order of the shards. `made_from` and `settings` (balance,
    prices) go into the manifest, as does the plan `made_with`. With `crossed`, labels are read, and this
    table counts them by cluster. With `border_share`, documents are lent to neighbours.
    `files` are further files of the rule beside the manifest.
    """

    label: Callable[[Shard], Labels]
    k: int
    made_from: dict[str, str]
    made_with: dict[str, Any]
    settings: dict[str, Any]
    crossed: labels.Crossed | None = None
    border_share: float = 0.0
    files: tuple[str, ...] = ()


class Validation(NamedTuple):
    """The validation documents and their clusters, shard by shard."""

    documents: list[token_files.Documents]
    labels: list[np.ndarray]


def weights(n_tokens_N: np.ndarray, balance: str) -> np.ndarray:
    """The weight of each document in the balance: its tokens (at least one) or 1."""
    return np.maximum(n_tokens_N, 1) if balance == "tokens" else np.ones(len(n_tokens_N))


def clusters_of(
    shards: Path,
    vectors: Path,
    centres_KD: np.ndarray,
    prices_K: np.ndarray,
    selection: heldout.Selection,
    documents: list[token_files.Documents],
) -> list[np.ndarray]:
    """Clusters of the validation documents, shard by shard, by their text and these centres and prices."""
    embedder = vector_files.read_embedder(vectors.with_name("embedder.npz"), shards)
    found = []
    for (entry, rows), of_shard in zip(selection, documents, strict=True):
        if isinstance(embedder, tfidf.Embedder):
            h_ND = tfidf.embed(of_shard, embedder.E_VD)
        else:
            column = shard_files.attributes(shards.parent, entry, ["text"])["text"]
            h_ND = encoder.embed(embedder, column.take(pa.array(rows)).to_pylist())
        found.append(kmeans.assign(h_ND, centres_KD, prices_K)[0])
    return found


class Totals:
    """Sums over all documents labelled so far, by cluster."""

    def __init__(self, k: int, balance: str):
        self.balance = balance
        self.n_documents_K, self.n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
        self.loads_K, self.inertia_K = np.zeros(k), np.zeros(k)
        self.borrowed_K, self.borrowed_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)

    def add(self, n_tokens_N: np.ndarray, labels: Labels) -> None:
        """Count the documents of a shard."""
        k = len(self.n_documents_K)
        self.n_documents_K += np.bincount(labels.labels_N, minlength=k)
        self.n_tokens_K += np.bincount(labels.labels_N, n_tokens_N, k).astype(np.int64)
        if labels.lent_N is not None:
            is_lent_N = labels.lent_N >= 0
            lent, n_tokens = labels.lent_N[is_lent_N], n_tokens_N[is_lent_N]
            self.borrowed_K += np.bincount(lent, minlength=k)
            self.borrowed_tokens_K += np.bincount(lent, n_tokens, k).astype(np.int64)
        if labels.d2_N is not None:
            weights_N = weights(n_tokens_N, self.balance)
            self.loads_K += np.bincount(labels.labels_N, weights_N, k)
            self.inertia_K += np.bincount(labels.labels_N, weights_N * labels.d2_N, k)

    def check(self) -> None:
        """Raise ValueError if a cluster is empty."""
        if not self.n_tokens_K.all():
            empty = np.flatnonzero(self.n_tokens_K == 0)
            raise ValueError(
                f"cluster.k: {len(self.n_tokens_K)}, of which cluster {empty[0]} and {len(empty) - 1} more "
                "are empty. Expected documents in each. Lower cluster.k, or raise cluster.fit_documents."
            )

    def content(self) -> dict[str, Any]:
        """The sizes of the clusters, as the manifest gives them. Logs them."""
        sizes = {"documents": self.n_documents_K, "tokens": self.n_tokens_K}
        over_mean = {
            unit: {"max": float(n_K.max() / n_K.mean()), "min": float(n_K.min() / n_K.mean())}
            for unit, n_K in sizes.items()
        }
        documents, tokens = self.n_documents_K.tolist(), self.n_tokens_K.tolist()
        cli.log.info("documents per cluster %s, tokens %s", documents, tokens)
        largest = over_mean["documents"]["max"], over_mean["tokens"]["max"]
        cli.log.info("largest cluster over mean: %.3f in documents, %.3f in tokens", *largest)
        return {"n_documents": documents, "n_tokens": tokens, "load_over_mean": over_mean}

    def border(self, share: float) -> dict[str, Any]:
        """What each cluster borrows at soft borders, as the manifest gives it. Logs it."""
        n_K, found_K = (
            self.borrowed_tokens_K,
            self.borrowed_tokens_K / (self.n_tokens_K + self.borrowed_tokens_K),
        )
        cli.log.info("borrowed: %.3f to %.3f of the tokens of each expert", found_K.min(), found_K.max())
        return {"share": share, "n_documents": self.borrowed_K.tolist(), "n_tokens": n_K.tolist()}

    def duality_gap(self, prices_K: np.ndarray) -> float:
        """The duality gap of the assignment by these prices. Logs it."""
        gap = kmeans.duality_gap(self.loads_K, prices_K, float(self.inertia_K.sum()))
        cli.log.info(
            "duality gap %.2g: no assignment with loads like these lowers the inertia by a larger share", gap
        )
        return gap


def write(
    shards: Path,
    train: list[shard_files.Entry],
    out: Path,
    grouping: Grouping,
    validation: Validation,
    n_threads: int,
) -> None:
    """Group and write all training shards and the validation documents, and `out` (manifest.json) last.

    Raises ValueError if a cluster ends up empty.
    """
    totals = Totals(grouping.k, grouping.settings["balance"])
    written = _write_shards(shards, train, out, grouping, totals, n_threads)
    totals.check()
    groups = zip(*(entry.pop("identity_groups") for entry in written), strict=True)
    content = {"shards": written, "k": grouping.k, **totals.content(), **grouping.settings}
    content["identity_groups"] = [artifact.fingerprint(list(identities)) for identities in groups]
    if "prices_K" in grouping.settings and "by" not in grouping.settings:
        content["duality_gap"] = totals.duality_gap(np.array(grouping.settings["prices_K"]))
    if grouping.border_share:
        content["border"] = totals.border(grouping.border_share)
    if grouping.crossed:
        content["labels"] = _log_agreement(grouping.crossed.content())
    content["identity_validation"] = None
    content["files"] = [*grouping.files]
    content["files"] += [f"{entry['name']}{suffix}" for entry in written for suffix in (".parquet", ".arrow")]
    if validation.documents:
        identities = heldout.write_validation(out, *validation, grouping.k, grouping.made_from)
        content["identity_validation"] = identities
        content["files"].append(heldout.VALIDATION_FILE)
    meta = artifact.make_meta("assignments", grouping.made_from, grouping.made_with, **content)
    artifact.write_sealed(out, meta)


def _log_agreement(found: dict[str, Any]) -> dict[str, Any]:
    if found["nmi"] is not None:
        values = found["n_labels"], found["purity"], found["nmi"]
        cli.log.info("clusters against %d labels: purity %.3f, NMI %.3f", *values)
    return found


def _write_shards(
    shards: Path,
    train: list[shard_files.Entry],
    out: Path,
    grouping: Grouping,
    totals: Totals,
    n_threads: int,
) -> list[dict[str, Any]]:
    """Label and write all shards, add them to `totals`, and return their entries for the manifest.

    This thread makes the labels in the order of the shards. The other threads read, regroup, hash and write,
    which takes most of the time.
    """
    progress = cli.Progress("assigned", sum(entry["n_documents"] for entry in train), "documents")

    def read(entry: shard_files.Entry) -> Shard:
        doc_ids = shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist()
        names = shard_files.labels(shards.parent, entry) if grouping.crossed else None
        return Shard(entry, shard_files.documents(shards.parent, entry), doc_ids, names)

    def label_in_order(read_shards: Iterable[Shard]) -> Iterator[tuple[Shard, Labels]]:
        for shard in read_shards:
            found = grouping.label(shard)
            totals.add(shard.documents.n_tokens, found)
            if grouping.crossed and shard.labels is not None:
                grouping.crossed.add(shard.labels, found.labels_N)
            yield shard, found

    def write_one(work: tuple[Shard, Labels]) -> dict[str, Any]:
        shard, found = work
        identities = write_shard(out.parent, shard, found, grouping.k, grouping.made_from)
        identity = artifact.fingerprint(identities)
        return {"name": shard.entry["name"], "identity": identity, "identity_groups": identities}

    written = []
    with ThreadPoolExecutor(n_threads) as pool:
        work = label_in_order(parallel.in_order(pool, read, train, n_threads))
        for entry, done in zip(train, parallel.in_order(pool, write_one, work, n_threads), strict=True):
            written.append(done)
            progress.add(entry["n_documents"])
    return written


def write_shard(folder: Path, shard: Shard, labels: Labels, k: int, made_from: dict[str, str]) -> list[str]:
    """Write a shard's Parquet file and its token file. Returns the identity of each group of tokens.

    Rows of the Parquet file are those of the shard. The token file has k groups, each in the order of the
    shard.
    """
    labels_N, d2_N, lent_N = labels
    columns = {
        "doc_id": pa.array(shard.doc_ids, pa.string()),
        "cluster": pa.array(labels_N, pa.int32()),
        "n_tokens": pa.array(shard.documents.n_tokens, pa.int32()),
        "d2": pa.nulls(len(labels_N), pa.float32()) if d2_N is None else pa.array(d2_N, pa.float32()),
    }
    if lent_N is not None:
        columns["lent_to"] = pa.array(lent_N, pa.int32(), mask=lent_N < 0)
    record = json.dumps(artifact.make_meta("assignments", made_from), sort_keys=True)
    meta: dict[bytes | str, bytes | str] = {"cbtm": record}
    with artifact.publish(folder / f"{shard.entry['name']}.parquet") as tmp:
        table = pa.table(columns).replace_schema_metadata(meta)
        pq.write_table(table, tmp, compression="zstd", write_page_checksum=True)
    lent_N = np.full(len(labels_N), -1) if lent_N is None else lent_N
    groups = (shard.documents.take(np.flatnonzero((labels_N == j) | (lent_N == j))) for j in range(k))
    path = folder / f"{shard.entry['name']}.arrow"
    return token_files.write(path, artifact.make_meta("tokens", made_from), groups)
