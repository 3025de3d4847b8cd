"""Deal the training documents to random clusters of equal weight, a control for the real clusters.

    python -m cbtm_pipeline.assign_random --config config.yaml --shards results/shards/manifest.json \\
        --out results/random/manifest.json

The text of a document plays no part. The output is laid out like that of `assign`.

Shapes: N documents of a shard, K clusters.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.clustering import regroup
from cbtm_pipeline.clustering.regroup import Grouping, Labels, Shard, Validation
from cbtm_pipeline.corpus import heldout, shard_files
from cbtm_pipeline.plan_clusters import AssignRandomPlan
from cbtm_pipeline.provenance import made_from


def deal(
    doc_ids: list[str],
    n_tokens_N: np.ndarray,
    n_documents_K: np.ndarray,
    n_tokens_K: np.ndarray,
    rng_seed: int,
) -> np.ndarray:
    """Random clusters (int32, (N,)) of a shard's documents.

    Clusters differ by at most one document, and by about one document's tokens. Documents are dealt like
    cards, in the order of a keyed hash of their ids. Of each hand of k, the longest document goes to the
    cluster with the fewest tokens so far. `n_documents_K` and `n_tokens_K` are the sums over earlier shards;
    this adds the new documents.
    """
    k = len(n_tokens_K)
    key = str(rng_seed).encode()
    hashes = [
        int.from_bytes(hashlib.blake2b(doc_id.encode(), key=key, digest_size=8).digest())
        for doc_id in doc_ids
    ]
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


def at_random(shards: Path, manifest: dict[str, Any], plan: AssignRandomPlan) -> Grouping:
    """The grouping of the training documents. Raises ValueError for more clusters than documents."""
    k = plan.k
    n = sum(entry["n_documents"] for entry in shard_files.entries(shards, manifest, "train"))
    if k > n:
        raise ValueError(
            f"cluster.k: {k}. Expected at most {n}, the number of documents. "
            "Lower cluster.k or add documents."
        )
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)

    def label(shard: Shard) -> Labels:
        n_tokens_N = shard.documents.n_tokens
        return Labels(deal(shard.doc_ids, n_tokens_N, n_documents_K, n_tokens_K, plan.rng_seed), None)

    return Grouping(label, k, made_from.assign_random(manifest), plan.content(), {"balance": "random"})


def deal_validation(shards: Path, k: int, rng_seed: int, selection: heldout.Selection) -> list[np.ndarray]:
    """Random clusters of the validation documents, shard by shard."""
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    labels = []
    for entry, rows in selection:
        columns = shard_files.attributes(shards.parent, entry, ["doc_id", "n_tokens"]).take(pa.array(rows))
        doc_ids, n_tokens_N = columns["doc_id"].to_pylist(), columns["n_tokens"].to_numpy()
        labels.append(deal(doc_ids, n_tokens_N, n_documents_K, n_tokens_K, rng_seed))
    return labels


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--out", required=True, type=Path, help="random/manifest.json; the shards go beside it")
    p.add_argument("--threads", type=int, default=1, help="shards read and written at the same time")
    args = p.parse_args(argv)
    cli.start_logging("assign_random", args.log)

    plan = plans.assign_random(config.read(args.config))
    manifest = artifact.read_sealed(args.shards, "shards")
    train = shard_files.entries(args.shards, manifest, "train")
    selection = heldout.select_validation(args.shards, manifest, plan.validation_share, plan.rng_seed)
    documents = heldout.read_validation(args.shards, selection)
    labels = deal_validation(args.shards, plan.k, plan.rng_seed, selection)
    grouping = at_random(args.shards, manifest, plan)
    regroup.write(args.shards, train, args.out, grouping, Validation(documents, labels), args.threads)


if __name__ == "__main__":
    cli.run(main)
