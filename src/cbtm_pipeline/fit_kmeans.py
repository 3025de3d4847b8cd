"""Find k balanced clusters of the training documents: centres, prices, certificate of the balance, terms.

    python -m cbtm_pipeline.fit_kmeans --config config.yaml --vectors results/embed/manifest.json \\
        --shards results/shards/manifest.json --tokenizer results/tokenizer/tokenizer.json \\
        --out results/cluster/clusterer.npz

The clusters are fitted on a sample of cluster.fit_documents documents from all shards. Writes top_terms.json
beside the clusterer: the terms that set each cluster apart.

Shapes: N documents of the sample, D dimensions, K clusters.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, device
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.clustering import kmeans, label_passes, labelled, parents, regroup
from cbtm_pipeline.clustering.sample import Sample, describe, read_sample
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import vectors as vector_files
from cbtm_pipeline.plan_clusters import ClusterPlan
from cbtm_pipeline.provenance import made_from

TOP_TERMS = "top_terms.json"  # beside the clusterer


def fit(sample: Sample, plan: ClusterPlan) -> kmeans.Clustering:
    """Cluster the sample. Raises ValueError where k clusters are impossible."""
    k, n = plan.k, len(sample.x_ND)
    if n == plan.fit_documents < k:
        raise ValueError(
            f"cluster.fit_documents: {n}. Expected at least cluster.k, {k}. Raise cluster.fit_documents."
        )
    progress = cli.Progress("k-means", None, "iterations")

    def report(run: int, iteration: int, inertia: float, balance: float) -> None:
        loads = f"largest load over mean {balance:.3f}"
        progress.add(1, f"run {run}, iteration {iteration}: inertia {inertia:.4f}, {loads}")

    # a document without tokens needs a weight, too, because it belongs to a cluster
    weights_N = np.maximum(sample.n_tokens_N, 1) if plan.balance == "tokens" else None
    found = kmeans.fit(
        sample.x_ND,
        k,
        weights_N=weights_N,
        balanced=plan.balance != "none",
        rng_seed=plan.rng_seed,
        n_init=plan.n_init,
        max_iterations=plan.max_iterations,
        device=device.best().type,
        progress=report,
    )
    if not plan.parents:
        return found
    return kmeans.renumbered(sample.x_ND, weights_N, found, by_parent(found.centres_KD, found.loads_K, plan))


def by_parent(centres_KD: np.ndarray, loads_K: np.ndarray, plan: ClusterPlan) -> np.ndarray:
    """The order of the clusters in which those of a parent follow each other."""
    assert plan.parents
    settings = {"rng_seed": plan.rng_seed, "n_init": plan.n_init, "max_iterations": plan.max_iterations}
    return parents.order(centres_KD, loads_K, plan.parents, **settings)


def fit_by_label(
    shards: Path, vectors: Path, sample: Sample, plan: ClusterPlan
) -> tuple[kmeans.Clustering, labelled.Rule]:
    """Cluster by labels, or by labels and text. The means are those of all training documents.

    Raises ValueError where documents have no labels, or labels do not fit the number of clusters.
    """
    if sample.labels is None:
        raise ValueError(f"{shards}: no labels. Expected those of corpus.label_field. {make_again(shards)}")
    weights, chunks = label_passes.weights(shards, plan.balance), label_passes.chunks
    weights_N = regroup.weights(sample.n_tokens_N, plan.balance)
    if plan.by == "label":
        groups = labelled.deal(weights, plan.k)
        centres_KD = labelled.means(chunks(shards, vectors, plan.balance), groups, plan.k)
        if plan.parents:
            loads_K = np.bincount(list(groups.values()), [weights[label] for label in groups], plan.k)
            order = by_parent(centres_KD, loads_K, plan)
            groups, centres_KD = labelled.renumbered(groups, order.tolist()), centres_KD[order]
        rule = labelled.Rule(centres_KD, groups=groups)
        labels_N, _ = rule.assign(sample.x_ND, sample.labels, np.zeros(plan.k))
    else:
        numbers = labelled.numbered(weights)
        means_LD = labelled.means(chunks(shards, vectors, plan.balance), numbers, len(numbers))
        means = dict(zip(numbers, means_LD, strict=True))
        found = fit(sample._replace(x_ND=labelled.pulled(sample.x_ND, sample.labels, means)), plan)
        labels_N = found.labels_N
        centres_KD = labelled.centres(sample.x_ND, weights_N, labels_N, plan.k)
        rule = labelled.Rule(centres_KD, None, means, found.centres_KD, found.prices_K)
    return labelled.certified(rule, sample.x_ND, weights_N, labels_N), rule


def write_clusterer(
    out: Path,
    clustering: kmeans.Clustering,
    plan: ClusterPlan,
    identities: dict[str, str],
    rule: labelled.Rule | None = None,
) -> str:
    """Write clusterer.npz, and log its certificate. Returns the file's seal."""
    certificate = {
        "n_documents": len(clustering.labels_N),
        "balance": plan.balance,
        "max_load": clustering.balance,
        "min_load": clustering.min_balance,
        "inertia": clustering.inertia,
        "duality_gap": clustering.duality_gap,
        "n_iterations": clustering.n_iterations,
    }
    values = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in certificate.items()
    )
    cli.log.info("%s", "  ".join(values))
    about: dict[str, Any] = {"certificate": certificate, "files": [TOP_TERMS]}
    arrays, of_labels = rule.stored() if rule else ({}, None)
    about |= {"labels": of_labels} if of_labels else {}
    return artifact.write_npz(
        out,
        artifact.make_meta("clusterer", identities, plan.content(), **about),
        centres_KD=clustering.centres_KD,
        prices_K=clustering.prices_K,
        loads_K=clustering.loads_K,
        **arrays,
    )


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--vectors", required=True, type=Path, help="embed/manifest.json")
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument(
        "--out", required=True, type=Path, help="cluster/clusterer.npz; top_terms.json goes beside it"
    )
    args = p.parse_args()
    cli.start_logging("fit_kmeans", args.log)

    plan = plans.fit_kmeans(config.read(args.config))
    by_text = plan.by == "text"
    embedder = args.vectors.with_name("embedder.npz")
    sample = read_sample(args.vectors, args.shards, plan.fit_documents, plan.rng_seed, not by_text)
    idf_V = vector_files.term_weights(embedder, args.shards, sample.counts)
    tokenizer = shard_files.tokenizer(args.tokenizer, args.shards)
    if by_text:
        clustering, rule = fit(sample, plan), None
    else:
        clustering, rule = fit_by_label(args.shards, args.vectors, sample, plan)
    terms = describe(sample, idf_V, clustering.labels_N[sample.counted], plan.k, tokenizer)
    for cluster, cluster_terms in enumerate(terms):
        cli.log.info("cluster %d: %s", cluster, " ".join(cluster_terms))
    for parent, groups in enumerate(np.array_split(np.arange(plan.k), plan.parents) if plan.parents else []):
        cli.log.info("parent-%d: clusters %d to %d", parent, groups[0], groups[-1])
    vectors = artifact.read_sealed(args.vectors, "vectors")
    shards = None if by_text else artifact.read_sealed(args.shards, "shards")
    identities = made_from.fit_kmeans(vectors, shards)
    seal = write_clusterer(args.out, clustering, plan, identities, rule)
    meta = artifact.make_meta("top_terms", {"clusterer": seal}, plan.content(), top_terms=terms)
    artifact.write_sealed(args.out.with_name(TOP_TERMS), meta)


if __name__ == "__main__":
    cli.run(main)
