"""Squared distance of every held-out token's prefix to every centre: all that the routers need from the text.

    python -m cbtm_pipeline.route --config config.yaml --shards results/shards/manifest.json \\
        --embedder results/embed/embedder.npz --clusterer results/cluster/clusterer.npz \\
        --tokenizer results/tokenizer/tokenizer.json --out results/route/distances.npz

Row t of a document serves the prediction of x_t and depends on x_0 ... x_(t-1) alone. With the linear tf-idf,
it depends on all of them. With an encoder, it depends on the text of the first floor(t / window_tokens) *
window_tokens of them (route.window_tokens). The distances do not include the prices: these make the clusters
equally heavy, which says nothing about one text. Only `cluster`, the cluster of the whole document, includes
them, as in `assign`.

With --ensemble DIR instead of --embedder and --clusterer, vectors and centres are those of an ensemble's
folder, and the text may be any. There are no prices then.

Shapes: T tokens of one document, N held-out tokens, R rows of one chunk, D dimensions, K clusters.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.corpus import heldout, shard_files
from cbtm_pipeline.embedding import encoder, tfidf, vectors
from cbtm_pipeline.inference import changed_set
from cbtm_pipeline.plan import RoutePlan
from cbtm_pipeline.provenance import made_from

# A prefix without a usable term is the zero vector. Its distances to the centres would depend only on their
# lengths, so it counts as equally far from all. Any constant gives equal weights; this is the squared length
# of other embeddings.
NO_EVIDENCE = 1.0
CHUNK_TEXTS = 512  # prefixes that an encoder sorts by length at once
TOKEN_RATIO = (
    4  # tokens of the run that are decoded for each token that an encoder reads: they may be shorter
)


def prefix_distances(
    documents: Iterable[np.ndarray], E_VD: np.ndarray, centres_KD: np.ndarray
) -> Iterator[np.ndarray]:
    """d2_RK (float32) of all tokens of documents `[sep, x_0, ..., x_(T-1)]`, in chunks.

    Row t of a document holds the squared distances of the prefix x_0 ... x_(t-1), which is empty at t = 0.
    They are NO_EVIDENCE for a prefix without usable terms.
    """
    for s_RD in tfidf.prefix_sums((document[:-1] for document in documents), E_VD):
        yield kmeans.directions_to_centres(s_RD, centres_KD, NO_EVIDENCE)


def text_distances(
    documents: Iterable[np.ndarray],
    centres_KD: np.ndarray,
    window_tokens: int,
    n_last: int,
    embed_tokens: Callable[[list[np.ndarray]], np.ndarray],
) -> Iterator[np.ndarray]:
    """d2_TK (float32) of each document `[sep, x_0, ..., x_(T-1)]`.

    Row t holds the squared distances of the prefix x_0 ... x_(b-1), where b is the last multiple of
    `window_tokens` up to t. Only the last `n_last` tokens of the prefix count. `embed_tokens` turns a list of
    runs of tokens into vectors (float32, rows of length one or zero). The distances are NO_EVIDENCE where b
    is 0 or the vector is zero.
    """
    for group in _groups(documents, window_tokens):
        ends = [range(1 + window_tokens, len(document), window_tokens) for document in group]
        pairs = zip(group, ends, strict=True)
        runs = [document[max(1, end - n_last) : end] for document, of_one in pairs for end in of_one]
        h_WD = embed_tokens(runs)
        d2_WK = kmeans.squared_distances(h_WD, centres_KD)
        d2_WK[~h_WD.any(axis=1)] = NO_EVIDENCE
        first = np.full((1, len(centres_KD)), NO_EVIDENCE, np.float32)
        by_document = np.split(d2_WK, np.cumsum([len(of_one) for of_one in ends])[:-1])
        for document, d2 in zip(group, by_document, strict=True):
            yield np.repeat(np.concatenate([first, d2]), window_tokens, axis=0)[: len(document) - 1]


def _groups(documents: Iterable[np.ndarray], window_tokens: int) -> Iterator[list[np.ndarray]]:
    """The documents in groups with about CHUNK_TEXTS prefixes each."""
    group, n = [], 0
    for document in documents:
        group.append(document)
        n += 1 + len(document) // window_tokens
        if n >= CHUNK_TEXTS:
            yield group
            group, n = [], 0
    if group:
        yield group


def read_clusterer(path: Path, embedder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The clusterer and its record. Raises ValueError if it was fitted on vectors of another embedder."""
    arrays, meta = artifact.read_npz(path, "clusterer")
    artifact.check_made_from(path, meta, "embedder", artifact.read_record(embedder, "embedder")["seal"])
    return arrays, meta


def distances(
    documents: Iterable[np.ndarray],
    n_tokens: int,
    embedder: vectors.Embedder,
    centres_KD: np.ndarray,
    tokenizer: Tokenizer,
    plan: RoutePlan,
) -> tuple[np.ndarray, np.ndarray]:
    """d2_NK of all tokens of the documents, and the documents' offsets (int64).

    `n_tokens` serves progress lines.
    """
    documents = list(documents)
    if isinstance(embedder, tfidf.Embedder):
        found = prefix_distances(documents, embedder.E_VD, centres_KD)
    else:

        def embed_tokens(runs: list[np.ndarray]) -> np.ndarray:
            texts = tokenizer.decode_batch([run.tolist() for run in runs], skip_special_tokens=False)
            return encoder.embed_ends(embedder, texts)

        assert plan.window_tokens is not None
        n_last = TOKEN_RATIO * embedder.size
        found = text_distances(documents, centres_KD, plan.window_tokens, n_last, embed_tokens)
    progress = cli.Progress("routed", n_tokens, "tokens")
    d2 = [np.empty((0, len(centres_KD)), np.float32)]
    for d2_RK in found:
        d2.append(d2_RK)
        progress.add(len(d2_RK))
    return np.concatenate(d2), np.cumsum([0, *(len(document) - 1 for document in documents)], dtype=np.int64)


def documents(
    shards: Path,
    manifest: dict[str, Any],
    max_document_tokens: int | None,
    embedder: vectors.Embedder,
    clusterer: dict[str, np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """Of all held-out documents: `doc_id`, `n_bytes` of the scored part, and `cluster` of the whole.

    The scored part of a cut document has the bytes of its decoded tokens.
    """
    doc_id, n_bytes, cluster = [], [], []
    for entry in shard_files.entries(shards, manifest, "eval"):
        group = shard_files.documents(shards.parent, entry)
        columns = shard_files.attributes(shards.parent, entry, ["doc_id", "n_bytes"]).to_pydict()
        h_ND = np.concatenate(list(vectors.embed(shards.parent, entry, embedder)))
        labels_N, _ = kmeans.assign(h_ND, clusterer["centres_KD"], clusterer["prices_K"])
        cut = group.n_tokens > (np.inf if max_document_tokens is None else max_document_tokens)
        for i in np.flatnonzero(cut):
            first = group.offsets[i] + 1
            ids = group.values[first : first + max_document_tokens].tolist()
            columns["n_bytes"][i] = len(tokenizer.decode(ids, skip_special_tokens=False).encode())
        doc_id += columns["doc_id"]
        n_bytes += columns["n_bytes"]
        cluster.append(labels_N)
    return {
        "doc_id": np.array(doc_id, np.str_),
        "n_bytes": np.array(n_bytes, np.int64),
        "cluster": np.concatenate(cluster),
    }


Router = tuple[vectors.Embedder, dict[str, np.ndarray], made_from.Identities]


def of_run(embedder: Path, clusterer: Path, shards: Path, manifest: dict[str, Any]) -> Router:
    """Embedder and clusterer of a run, and what distances of these shards are made from."""
    found = vectors.read_embedder(embedder, shards)
    arrays, record = read_clusterer(clusterer, embedder)
    return found, arrays, made_from.route(manifest, record)


def of_ensemble(folder: Path, manifest: dict[str, Any]) -> Router:
    """The same, of the folder of an ensemble. It has centres, and no prices."""
    found = changed_set.read(folder)
    embedder = tfidf.Embedder(found.embedding_VD, np.empty(0, np.float32))  # no weight of a term is read
    arrays = {"centres_KD": found.centres_KD, "prices_K": np.zeros(len(found.names))}
    return embedder, arrays, made_from.route_by_ensemble(manifest, found.record)


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--embedder", type=Path, help="embed/embedder.npz")
    p.add_argument("--clusterer", type=Path, help="cluster/clusterer.npz")
    p.add_argument("--ensemble", type=Path, help="folder of an ensemble, instead of these two")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument("--out", required=True, type=Path, help="route/distances.npz")
    args = p.parse_args()
    if not args.ensemble and not (args.embedder and args.clusterer):
        p.error("--embedder and --clusterer, or --ensemble")
    cli.start_logging("route", args.log)

    plan = plans.route(config.read(args.config))
    manifest = artifact.read_sealed(args.shards, "shards")
    if args.ensemble:
        embedder, clusterer, identities = of_ensemble(args.ensemble, manifest)
    else:
        embedder, clusterer, identities = of_run(args.embedder, args.clusterer, args.shards, manifest)
    tokenizer = shard_files.tokenizer(args.tokenizer, args.shards)
    columns = documents(args.shards, manifest, plan.max_document_tokens, embedder, clusterer, tokenizer)
    named = heldout.documents(args.shards.parent, manifest, plan.max_document_tokens)
    held_out = (document for _, document in named)
    n_tokens = sum(entry["n_tokens"] for entry in manifest["shards"] if entry["split"] == "eval")
    d2_NK, offsets = distances(held_out, n_tokens, embedder, clusterer["centres_KD"], tokenizer, plan)
    meta = artifact.make_meta("distances", identities, plan.content())
    artifact.write_npz(args.out, meta, d2_NK=d2_NK, offsets=offsets, **columns)
    cli.log.info("routed %d documents, %d tokens", len(offsets) - 1, len(d2_NK))


if __name__ == "__main__":
    cli.run(main)
