"""Give every training document to a cluster, and write each shard's tokens again, grouped by cluster.

    python -m cbtm_pipeline.assign --config config.yaml --shards results/shards/manifest.json \\
        --vectors results/embed/manifest.json --clusterer results/cluster/clusterer.npz \\
        --out results/assignments/manifest.json

A document goes to the cluster with the least squared distance plus price, or where its label says
(cluster.by). The prices balance the documents that they were fitted on. If the corpus holds more documents,
passes over its vectors first correct the prices for all of them (`prices.refine`). The clusterer keeps its
own prices.

Shapes: N documents of a shard, D dimensions, K clusters.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.clustering import borders, labelled, prices, regroup
from cbtm_pipeline.clustering.regroup import Grouping, Labels, Shard, Validation
from cbtm_pipeline.corpus import heldout, labels, shard_files
from cbtm_pipeline.embedding import vectors as vector_files
from cbtm_pipeline.plan_clusters import AssignPlan
from cbtm_pipeline.provenance import made_from


def by_clusterer(shards: Path, vectors: Path, clusterer: Path, plan: AssignPlan) -> Grouping:
    """The grouping by the clusters of `fit_kmeans`, with prices corrected for the whole corpus.

    Raises ValueError if vectors or clusterer were made from other files.
    """
    shards_manifest = artifact.read_sealed(shards, "shards")
    train = shard_files.entries(shards, shards_manifest, "train")
    manifest = vector_files.read_manifest(vectors, shards)
    arrays, meta = artifact.read_npz(clusterer, "clusterer")
    artifact.check_made_from(clusterer, meta, "vectors", manifest["seal"])
    identities = made_from.assign(shards_manifest, meta)
    if "labels" in meta:
        artifact.check_made_from(clusterer, meta, "labels", identities.get("labels", "none"))
    rule, certificate = labelled.read(arrays, meta), meta["certificate"]
    known_K = arrays["prices_K"] if rule.fit_prices_K is None else rule.fit_prices_K
    k, prices_K, balance, prices_of = len(known_K), known_K, certificate["balance"], "clusterer"
    by_name = {entry["name"]: entry for entry in manifest["shards"]}

    def read_vectors(entry: shard_files.Entry) -> np.ndarray:
        return vector_files.read(vectors.parent, by_name[entry["name"]])

    def read_chunks() -> Iterator[prices.Chunk]:
        for entry in train:
            names = shard_files.labels(shards.parent, entry) if rule.means else None
            x_ND = rule.space(read_vectors(entry), names)
            n_tokens_N = shard_files.attributes(shards.parent, entry, ["n_tokens"])["n_tokens"].to_numpy()
            weights_N = regroup.weights(n_tokens_N, balance)
            yield from prices.cut(x_ND, weights_N)

    n_documents = sum(entry["n_documents"] for entry in train)
    if balance != "none" and n_documents > certificate["n_documents"] and not rule.groups:
        prices_K, largest = prices.refine(read_chunks, rule.priced_centres_KD, prices_K)
        prices_of = "clusterer" if np.array_equal(prices_K, known_K) else "corpus"
        message = "prices of the %s balance the whole corpus: largest load over mean %.3f"
        cli.log.info(message, prices_of, largest)

    def at_border(entry: shard_files.Entry) -> borders.Border:
        names = shard_files.labels(shards.parent, entry) if rule.groups or rule.means else None
        x_ND = read_vectors(entry)
        own_N, _ = rule.assign(x_ND, names, prices_K)
        n_tokens_N = shard_files.attributes(shards.parent, entry, ["n_tokens"])["n_tokens"].to_numpy()
        return borders.border(rule.costs(x_ND, names, prices_K), own_N, n_tokens_N)

    lent = {}
    if plan.border_share and k > 1:
        found = borders.lend([at_border(entry) for entry in train], k, plan.border_share)
        lent = dict(zip((entry["name"] for entry in train), found, strict=True))

    def label(shard: Shard) -> Labels:
        found = rule.assign(read_vectors(shard.entry), shard.labels, prices_K)
        return Labels(*found, lent.get(shard.entry["name"]))

    settings = {"balance": balance, "prices": prices_of, "prices_K": prices_K.tolist()}
    settings |= rule.settings(prices_K)
    crossed = labels.Crossed(k) if "labels" in identities else None
    border_share = plan.border_share if lent else 0.0
    return Grouping(label, k, identities, plan.content(), settings, crossed, border_share)


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--vectors", required=True, type=Path, help="embed/manifest.json")
    p.add_argument("--clusterer", required=True, type=Path, help="cluster/clusterer.npz")
    p.add_argument(
        "--out", required=True, type=Path, help="assignments/manifest.json; the shards go beside it"
    )
    p.add_argument("--threads", type=int, default=1, help="shards read and written at the same time")
    args = p.parse_args(argv)
    cli.start_logging("assign", args.log)

    plan = plans.assign(config.read(args.config))
    manifest = artifact.read_sealed(args.shards, "shards")
    train = shard_files.entries(args.shards, manifest, "train")
    selection = heldout.select_validation(args.shards, manifest, plan.validation_share, plan.rng_seed)
    documents = heldout.read_validation(args.shards, selection)
    grouping = by_clusterer(args.shards, args.vectors, args.clusterer, plan)
    centres_KD = artifact.read_npz(args.clusterer, "clusterer")[0]["centres_KD"]
    of_validation = regroup.clusters_of(
        args.shards, args.vectors, centres_KD, np.array(grouping.settings["prices_K"]), selection, documents
    )
    regroup.write(args.shards, train, args.out, grouping, Validation(documents, of_validation), args.threads)


if __name__ == "__main__":
    cli.run(main)
