"""Squared distance of every held-out token's prefix to every centre: all that the routers need from the text.

    python -m cbtm_pipeline.route --config config.yaml --shards results/shards/manifest.json --embedder results/embed/embedder.npz \\
        --clusterer results/cluster/clusterer.npz --tokenizer results/tokenizer/tokenizer.json --out results/route/distances.npz

Row t of a document is about predicting x_t, and depends on x_0 ... x_(t-1) alone. Prices play no part: they make clusters equal, which says
nothing about one text. Only `cluster`, the cluster of the whole document, is found as `assign` finds it.

Shapes: T tokens of one document, N held-out tokens, R rows of one chunk, D dimensions, K clusters.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cbtm_pipeline import artifact, cli, config, corpus, embed, heldout, kmeans, tfidf

# A prefix without a usable term is the zero vector, whose distances to the centres would tell only how long these are: it counts as
# equally far from all. Any constant gives equal weights; this one is the squared length of every other embedding.
NO_EVIDENCE = 1.0


def prefix_distances(document: np.ndarray, E_VD: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """d2_TK (float32) of `[sep, x_0, ..., x_(T-1)]`: row t holds the squared distances of the prefix x_0 ... x_(t-1), empty at t = 0.

    A prefix without usable terms is no evidence: NO_EVIDENCE for every cluster.
    """
    chunks = [np.empty((0, len(centres_KD)), np.float32)]
    for h_RD in tfidf.embed_prefixes(document[:-1], E_VD):
        d2_RK = kmeans.squared_distances(h_RD, centres_KD)
        d2_RK[~h_RD.any(axis=1)] = NO_EVIDENCE
        chunks.append(d2_RK)
    return np.concatenate(chunks)


def read_clusterer(path: Path, embedder: Path) -> dict[str, np.ndarray]:
    """The clusterer's arrays. Raises ValueError unless it was fitted on vectors of this embedder."""
    arrays, meta = artifact.read_npz(path, "clusterer")
    artifact.check_made_from(path, meta, "embedder", artifact.identity(embedder))
    return arrays


def distances(
    shards: Path, manifest: dict[str, Any], max_document_tokens: int | None, E_VD: np.ndarray, clusterer: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """d2_NK of all held-out tokens in the order of `heldout.documents`, and the documents' offsets (int64)."""
    n_tokens = sum(entry["n_tokens"] for entry in manifest["shards"] if entry["split"] == "eval")
    progress = cli.Progress("routed", n_tokens, "tokens")
    d2, lengths = [], [0]
    for _, document in heldout.documents(shards.parent, manifest, max_document_tokens):
        d2.append(prefix_distances(document, E_VD, clusterer["centres_KD"]))
        lengths.append(len(d2[-1]))
        progress.add(len(d2[-1]))
    return np.concatenate(d2), np.cumsum(lengths, dtype=np.int64)


def documents(
    shards: Path,
    manifest: dict[str, Any],
    max_document_tokens: int | None,
    E_VD: np.ndarray,
    clusterer: dict[str, np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """Of every held-out document: `doc_id`, `n_bytes` of what is scored of it, and `cluster` of all of it.

    Where a document is cut, its bytes are those of the decoded tokens.
    """
    doc_id, n_bytes, cluster = [], [], []
    for entry in corpus.entries(shards, manifest, "eval"):
        group = corpus.documents(shards.parent, entry)
        columns = corpus.attributes(shards.parent, entry, ["doc_id", "n_bytes"]).to_pydict()
        labels_N, _ = kmeans.assign(tfidf.embed(group, E_VD), clusterer["centres_KD"], clusterer["prices_K"])
        cut = group.n_tokens > (np.inf if max_document_tokens is None else max_document_tokens)
        for i in np.flatnonzero(cut):
            first = group.offsets[i] + 1
            text = tokenizer.decode(group.values[first : first + max_document_tokens].tolist(), skip_special_tokens=False)
            columns["n_bytes"][i] = len(text.encode())
        doc_id += columns["doc_id"]
        n_bytes += columns["n_bytes"]
        cluster.append(labels_N)
    return {"doc_id": np.array(doc_id, np.str_), "n_bytes": np.array(n_bytes, np.int64), "cluster": np.concatenate(cluster)}


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--embedder", required=True, type=Path, help="embed/embedder.npz")
    p.add_argument("--clusterer", required=True, type=Path, help="cluster/clusterer.npz")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument("--out", required=True, type=Path, help="route/distances.npz")
    args = p.parse_args()
    cli.start_logging("route", args.log)

    how = config.parameters(config.read(args.config), "route")
    manifest = artifact.read_json(args.shards, "shards")
    E_VD = embed.read_embedder(args.embedder, args.shards).E_VD
    clusterer = read_clusterer(args.clusterer, args.embedder)
    tokenizer = corpus.tokenizer(args.tokenizer, args.shards)
    about = documents(args.shards, manifest, how["max_document_tokens"], E_VD, clusterer, tokenizer)
    d2_NK, offsets = distances(args.shards, manifest, how["max_document_tokens"], E_VD, clusterer)
    made_from = {name: artifact.identity(getattr(args, name)) for name in ("shards", "embedder", "clusterer")}
    artifact.write_npz(args.out, artifact.make_meta("distances", made_from, **how), d2_NK=d2_NK, offsets=offsets, **about)
    cli.log.info("routed %d documents, %d tokens", len(offsets) - 1, len(d2_NK))


if __name__ == "__main__":
    cli.run(main)
