"""Give every training document to a cluster, and write each shard's tokens again, grouped by cluster.

    python -m cbtm_pipeline.assign --config config.yaml --shards results/shards/manifest.json --vectors results/embed/manifest.json \\
        --clusterer results/cluster/clusterer.npz --out results/assignments/manifest.json
    python -m cbtm_pipeline.assign --config config.yaml --random --shards results/shards/manifest.json --out results/random/manifest.json

One streaming argmin of squared distance plus price; memory holds a few shards, whatever the corpus. The prices balance the documents that
they were fitted on. Where the corpus holds more, passes over its vectors first mend what sampling left (`prices.refine`); the clusterer
keeps its own. Random clusters are the control: equally heavy, and dealt without a look at the text.

Shapes: N documents of a shard, R documents of a chunk, D dimensions, K clusters.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_pipeline import config, embed
from cbtm_pipeline.base import artifact, cli, parallel
from cbtm_pipeline.clustering import kmeans, prices
from cbtm_pipeline.corpus import shard_files, token_files
from cbtm_pipeline.embedding import encoder, tfidf
from cbtm_pipeline.training import validation

CHUNK_ROWS = 1 << 14


class Shard(NamedTuple):
    """A shard's entry in the manifest, its documents and their names."""

    entry: shard_files.Entry
    documents: token_files.Documents
    doc_ids: list[str]


Labels = tuple[np.ndarray, np.ndarray | None]
Labeller = Callable[[shard_files.Entry, token_files.Documents, list[str]], Labels]


def deal(doc_ids: list[str], n_tokens_N: np.ndarray, n_documents_K: np.ndarray, n_tokens_K: np.ndarray, rng_seed: int) -> np.ndarray:
    """Random clusters (int32) of a shard's documents, equal in documents to within one and in tokens to within about a document.

    Documents are dealt like cards, in the order of a keyed hash of their ids: one to each cluster, the longest of k to the cluster with
    the fewest tokens so far. `n_documents_K` and `n_tokens_K` say what earlier shards gave to each cluster; they are updated.
    """
    k = len(n_tokens_K)
    key = str(rng_seed).encode()
    hashes = [int.from_bytes(hashlib.blake2b(doc_id.encode(), key=key, digest_size=8).digest()) for doc_id in doc_ids]
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    labels_N = np.empty(len(doc_ids), np.int32)
    for start in range(0, len(order), k):
        hand = order[start : start + k]
        hand = hand[np.argsort(-n_tokens_N[hand], kind="stable")]
        takers = np.lexsort((n_tokens_K, n_documents_K))[: len(hand)]
        takers = takers[np.argsort(n_tokens_K[takers], kind="stable")]
        labels_N[hand] = takers
        n_documents_K[takers] += 1
        n_tokens_K[takers] += n_tokens_N[hand]
    return labels_N


def weights(n_tokens_N: np.ndarray, balance: str) -> np.ndarray:
    """What each document weighs in the balance."""
    return np.maximum(n_tokens_N, 1) if balance == "tokens" else np.ones(len(n_tokens_N))


def by_clusterer(
    shards: Path, train: list[shard_files.Entry], vectors: Path, clusterer: Path
) -> tuple[Labeller, int, dict[str, str], dict[str, Any]]:
    """How documents find their cluster, the number of clusters, `made_from`, and what the manifest says about the prices."""
    manifest = embed.read_manifest(vectors, shards)
    arrays, meta = artifact.read_npz(clusterer, "clusterer")
    artifact.check_made_from(clusterer, meta, "vectors", artifact.identity(vectors))
    centres_KD, prices_K, certificate = arrays["centres_KD"], arrays["prices_K"], meta["certificate"]
    by_name = {entry["name"]: entry for entry in manifest["shards"]}
    made_with = "clusterer"

    def read_chunks() -> Iterable[prices.Chunk]:
        for entry in train:
            x_ND = embed.read_vectors(vectors.parent, by_name[entry["name"]])
            n_tokens_N = shard_files.attributes(shards.parent, entry, ["n_tokens"])["n_tokens"].to_numpy()
            weights_N = weights(n_tokens_N, certificate["balance"])
            for start in range(0, len(x_ND), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                yield x_ND[rows], weights_N[rows]

    if certificate["balance"] != "none" and sum(entry["n_documents"] for entry in train) > certificate["n_documents"]:
        prices_K, balance = prices.refine(read_chunks, centres_KD, prices_K)
        made_with = "clusterer" if np.array_equal(prices_K, arrays["prices_K"]) else "corpus"
        cli.log.info("prices of the %s balance the whole corpus: largest load over mean %.3f", made_with, balance)

    def label(entry: shard_files.Entry, documents: token_files.Documents, doc_ids: list[str]) -> Labels:
        return kmeans.assign(embed.read_vectors(vectors.parent, by_name[entry["name"]]), centres_KD, prices_K)

    made_from = {"clusterer": artifact.identity(clusterer), "shards": artifact.identity(shards)}
    about = {"balance": certificate["balance"], "prices": made_with, "prices_K": prices_K.tolist()}
    return label, len(centres_KD), made_from, about


def at_random(shards: Path, train: list[shard_files.Entry], k: int, rng_seed: int) -> tuple[Labeller, int, dict[str, str], dict[str, Any]]:
    """The same for random clusters."""
    n = sum(entry["n_documents"] for entry in train)
    if k > n:
        raise ValueError(f"cluster.k: {k}. Expected at most {n}, the number of documents. Lower cluster.k or add documents.")
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)

    def label(entry: shard_files.Entry, documents: token_files.Documents, doc_ids: list[str]) -> Labels:
        return deal(doc_ids, documents.n_tokens, n_documents_K, n_tokens_K, rng_seed), None

    return label, k, {"shards": artifact.identity(shards)}, {"balance": "random"}


def label_validation(
    shards: Path,
    vectors: Path,
    clusterer: Path,
    prices_K: list[float],
    chosen: list[tuple[shard_files.Entry, np.ndarray]],
    some: list[token_files.Documents],
) -> list[np.ndarray]:
    """Clusters of the held-out documents `some`, the rows `chosen`, shard by shard, found as those of the training documents are."""
    embedder = embed.read_embedder(vectors.with_name("embedder.npz"), shards)
    centres_KD = artifact.read_npz(clusterer, "clusterer")[0]["centres_KD"]
    labels = []
    for (entry, rows), documents in zip(chosen, some, strict=True):
        if isinstance(embedder, tfidf.Embedder):
            h_ND = tfidf.embed(documents, embedder.E_VD)
        else:
            texts = shard_files.attributes(shards.parent, entry, ["text"])["text"].take(pa.array(rows)).to_pylist()
            h_ND = encoder.embed(embedder, texts)
        labels.append(kmeans.assign(h_ND, centres_KD, np.array(prices_K))[0])
    return labels


def deal_validation(shards: Path, k: int, rng_seed: int, chosen: list[tuple[shard_files.Entry, np.ndarray]]) -> list[np.ndarray]:
    """The same for random clusters."""
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    labels = []
    for entry, rows in chosen:
        columns = shard_files.attributes(shards.parent, entry, ["doc_id", "n_tokens"]).take(pa.array(rows))
        labels.append(deal(columns["doc_id"].to_pylist(), columns["n_tokens"].to_numpy(), n_documents_K, n_tokens_K, rng_seed))
    return labels


def write_shard(
    folder: Path, name: str, documents: token_files.Documents, doc_ids: list[str], labels: Labels, k: int, made_from: dict[str, str]
) -> None:
    """Write a shard's Parquet file, rows as in the shard, and its tokens in k groups, each in the order of the shard."""
    labels_N, d2_N = labels
    columns = {
        "doc_id": pa.array(doc_ids, pa.string()),
        "cluster": pa.array(labels_N, pa.int32()),
        "n_tokens": pa.array(documents.n_tokens, pa.int32()),
        "d2": pa.nulls(len(labels_N), pa.float32()) if d2_N is None else pa.array(d2_N, pa.float32()),
    }
    meta: dict[bytes | str, bytes | str] = {"cbtm": json.dumps(artifact.make_meta("assignments", made_from), sort_keys=True)}
    with artifact.publish(folder / f"{name}.parquet") as tmp:
        pq.write_table(pa.table(columns).replace_schema_metadata(meta), tmp, compression="zstd")
    groups = (documents.take(np.flatnonzero(labels_N == j)) for j in range(k))
    token_files.write(folder / f"{name}.arrow", artifact.make_meta("tokens", made_from), groups)


def write_all(
    shards: Path,
    train: list[shard_files.Entry],
    out: Path,
    label: Labeller,
    k: int,
    made_from: dict[str, str],
    about: dict[str, Any],
    n_threads: int,
) -> dict[str, Any]:
    """Assign and write shard by shard; return what the manifest says of them, beside what it says `about` the labels. Raises ValueError if
    a cluster ends up empty.

    Labels are made in the order of the shards; what costs time, reading, regrouping, hashing and writing, is done by the threads.
    """
    n_documents_K, n_tokens_K, loads_K, inertia_K = np.zeros(k, np.int64), np.zeros(k, np.int64), np.zeros(k), np.zeros(k)
    progress = cli.Progress("assigned", sum(entry["n_documents"] for entry in train), "documents")

    def read(entry: shard_files.Entry) -> Shard:
        doc_ids = shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist()
        return Shard(entry, shard_files.documents(shards.parent, entry), doc_ids)

    def labelled(read_shards: Iterable[Shard]) -> Iterator[tuple[Shard, Labels]]:
        for shard in read_shards:
            labels_N, d2_N = label(*shard)
            n_documents_K[:] += np.bincount(labels_N, minlength=k)
            n_tokens_K[:] += np.bincount(labels_N, shard.documents.n_tokens, k).astype(np.int64)
            if d2_N is not None:
                weights_N = weights(shard.documents.n_tokens, about["balance"])
                loads_K[:] += np.bincount(labels_N, weights_N, k)
                inertia_K[:] += np.bincount(labels_N, weights_N * d2_N, k)
            yield shard, (labels_N, d2_N)

    def write(work: tuple[Shard, Labels]) -> dict[str, str]:
        (entry, documents, doc_ids), labels = work
        name = entry["name"]
        write_shard(out.parent, name, documents, doc_ids, labels, k, made_from)
        return {"name": name, "identity_tokens": artifact.identity(out.with_name(f"{name}.arrow"))}

    with ThreadPoolExecutor(n_threads) as pool:
        work = labelled(parallel.in_order(pool, read, train, n_threads))
        written = []
        for entry, done in zip(train, parallel.in_order(pool, write, work, n_threads), strict=True):
            written.append(done)
            progress.add(entry["n_documents"])
    if not n_tokens_K.all():
        empty = np.flatnonzero(n_tokens_K == 0)
        raise ValueError(
            f"cluster.k: {k}, of which cluster {empty[0]} and {len(empty) - 1} more are empty. Expected documents in each. "
            "Lower cluster.k, or raise cluster.fit_documents."
        )
    largest = {"documents": n_documents_K, "tokens": n_tokens_K}
    loads = {what: {"max": float(n_K.max() / n_K.mean()), "min": float(n_K.min() / n_K.mean())} for what, n_K in largest.items()}
    cli.log.info("documents per cluster %s, tokens %s", n_documents_K.tolist(), n_tokens_K.tolist())
    cli.log.info("largest cluster over mean: %.3f in documents, %.3f in tokens", loads["documents"]["max"], loads["tokens"]["max"])
    content = {"shards": written, "k": k, "n_documents": n_documents_K.tolist(), "n_tokens": n_tokens_K.tolist(), "load_over_mean": loads}
    if "prices_K" in about:
        content["duality_gap"] = kmeans.duality_gap(loads_K, np.array(about["prices_K"]), float(inertia_K.sum()))
        cli.log.info("duality gap %.2g: no assignment with loads like these has an inertia lower by more", content["duality_gap"])
    return content | about


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--random", action="store_true", help="random clusters of equal weight instead")
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--vectors", type=Path, help="embed/manifest.json")
    p.add_argument("--clusterer", type=Path, help="cluster/clusterer.npz")
    p.add_argument("--out", required=True, type=Path, help="assignments/manifest.json; the assigned shards go beside it")
    p.add_argument("--threads", type=int, default=1, help="shards read and written at the same time")
    args = p.parse_args()
    _check_inputs(p, args)
    cli.start_logging("assign_random" if args.random else "assign", args.log)

    cfg = config.read(args.config)
    how = config.parameters(cfg, "assign_random" if args.random else "assign")
    manifest = artifact.read_json(args.shards, "shards")
    train = shard_files.entries(args.shards, manifest, "train")
    chosen = validation.rows(args.shards, manifest, how["validation_share"], how["rng_seed"])
    some = validation.documents(args.shards, chosen)
    if args.random:
        label, k, made_from, about = at_random(args.shards, train, how["k"], how["rng_seed"])
        labels = deal_validation(args.shards, k, how["rng_seed"], chosen)
    else:
        label, k, made_from, about = by_clusterer(args.shards, train, args.vectors, args.clusterer)
        labels = label_validation(args.shards, args.vectors, args.clusterer, about["prices_K"], chosen, some)
    content = write_all(args.shards, train, args.out, label, k, made_from, about, args.threads)
    if chosen:
        validation.write(args.out, some, labels, k, made_from)
    content["identity_validation"] = artifact.identity(args.out.with_name(validation.NAME)) if chosen else None
    artifact.write_json(args.out, artifact.make_meta("assignments", made_from, **content))


def _check_inputs(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.random == bool(args.vectors or args.clusterer) or bool(args.vectors) != bool(args.clusterer):
        p.error("give either --vectors and --clusterer, or --random")


if __name__ == "__main__":
    cli.run(main)
