"""Give every training document to the expert of the first round that predicts it best (cluster.second_round).

    python -m cbtm_pipeline.second_round --config results/config.json --shards results/shards/manifest.json \\
        --vectors results/embed/manifest.json --assignments results/assignments/manifest.json \\
        --scores results/second/scores/first-*.npz --tokenizer results/tokenizer/tokenizer.json \\
        --out results/second/manifest.json

The costs are those of `score_training`, and prices balance the clusters (clustering/second.py). Documents
that were not scored go by their text. Writes assignments like those of `assign`, and beside them the new
clusterer.npz, whose centres are the mean vectors of the new clusters, and its top_terms.json.

Shapes: N documents, D dimensions, K clusters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from cbtm_pipeline import config, plan_first
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.errors import run_again
from cbtm_pipeline.clustering import kmeans, prices, regroup, second
from cbtm_pipeline.clustering.regroup import Grouping, Labels, Shard, Validation
from cbtm_pipeline.clustering.sample import Sample, describe, read_sample
from cbtm_pipeline.corpus import heldout, labels, shard_files
from cbtm_pipeline.embedding import vectors as vector_files
from cbtm_pipeline.plan_clusters import SecondRoundPlan
from cbtm_pipeline.provenance import made_from

CLUSTERER, TOP_TERMS = "clusterer.npz", "top_terms.json"  # beside the manifest


class Files(NamedTuple):
    """The inputs: manifests, and the scores of the experts of the first round."""

    shards: Path
    vectors: Path
    assignments: Path
    scores: list[Path]
    tokenizer: Path


def read_scores(
    files: Files, names: list[str], shards: dict[str, Any], first: dict[str, Any]
) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """The costs of the scored documents, (N, K), and the records of the files by expert, in cluster order.

    Raises ValueError if one is missing, or is of other documents or of an expert of other clusters.
    """
    found = {}
    for path in files.scores:
        arrays, meta = artifact.read_npz(path, "training_scores")
        artifact.check_made_from(path, meta, "shards", shards["identity_train"])
        if meta["expert"] in names:
            tokens = made_from.tokens([names.index(meta["expert"])], first)
            if meta["tokens"] != tokens:
                raise ValueError(
                    f"{path}: of an expert on other documents than its cluster of {files.assignments}. "
                    f"Expected that cluster. {run_again(path)}"
                )
        found[meta["expert"]] = arrays["nll_N"], meta
    if sorted(found) != sorted(names):
        raise ValueError(
            f"--scores: {', '.join(sorted(found)) or 'none'}. Expected {', '.join(names)}. "
            "Give those of every expert of the first round."
        )
    return np.stack([found[name][0] for name in names], axis=1), {name: found[name][1] for name in names}


def by_score(
    files: Files, plan: SecondRoundPlan, shards: dict[str, Any], found: second.Round, origin: dict[str, str]
) -> regroup.Grouping:
    """The grouping by what experts predict. `found` is of the scored documents; others go by text."""
    train = shard_files.entries(files.shards, shards, "train")
    manifest = vector_files.read_manifest(files.vectors, files.shards)
    by_name = {entry["name"]: entry for entry in manifest["shards"]}
    rows_of, start, n_moved = {}, 0, 0
    for entry, rows in shard_files.sample(train, plan.fit_documents, plan.rng_seed):
        chosen = found.labels_N[start : start + len(rows)]
        path = files.assignments.with_name(f"{entry['name']}.parquet")
        before = pq.read_table(path, columns=["cluster"], page_checksum_verification=True)["cluster"]
        n_moved += int((before.to_numpy()[rows] != chosen).sum())
        rows_of[entry["name"]] = rows, chosen
        start += len(rows)
    cli.log.info("%d of %d scored documents have another cluster than in the first round", n_moved, start)

    def others() -> Iterator[prices.Chunk]:
        for entry in train:
            left_N = np.ones(entry["n_documents"], bool)
            left_N[rows_of[entry["name"]][0]] = False
            if not left_N.any():
                continue
            x_ND = vector_files.read(files.vectors.parent, by_name[entry["name"]])[left_N]
            column = shard_files.attributes(files.shards.parent, entry, ["n_tokens"])["n_tokens"].to_numpy()
            weights_N = regroup.weights(column[left_N], plan.balance)
            yield from prices.cut(x_ND, weights_N)

    text_prices_K = second.text_prices(others, found.centres_KD, plan.balance != "none")

    def label(shard: Shard) -> Labels:
        name = shard.entry["name"]
        x_ND = vector_files.read(files.vectors.parent, by_name[name])
        labels_N, _ = kmeans.assign(x_ND, found.centres_KD, text_prices_K)
        rows, chosen = rows_of[name]
        labels_N[rows] = chosen
        d2_NK = kmeans.squared_distances(x_ND, found.centres_KD)
        return Labels(labels_N, d2_NK[np.arange(len(x_ND)), labels_N])

    zeros = [0.0] * plan.k
    settings = {"balance": plan.balance, "by": "second_round", "prices": "none", "prices_K": zeros}
    settings["fit_prices_K"] = found.prices_K.tolist()
    settings["second_round"] = {"n_scored": start, "n_moved": n_moved}
    crossed = labels.Crossed(plan.k) if made_from.labels(shards, "train") else None
    return Grouping(label, plan.k, origin, plan.content(), settings, crossed, files=(CLUSTERER, TOP_TERMS))


def write_clusterer(out: Path, found: second.Round, plan: SecondRoundPlan, origin: dict[str, str]) -> str:
    """Write clusterer.npz. Its prices are zero, as routers know nothing but centres. Returns the seal."""
    mean = found.loads_K.mean()
    made_with = {key: value for key, value in plan.content().items() if key != "validation_share"}
    certificate = {
        "n_documents": len(found.labels_N),
        "balance": plan.balance,
        "max_load": float(found.loads_K.max() / mean),
        "min_load": float(found.loads_K.min() / mean),
        "nll": found.nll,
        "duality_gap": found.duality_gap,
    }
    told = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in certificate.items())
    cli.log.info("%s", "  ".join(told))
    return artifact.write_npz(
        out,
        artifact.make_meta("clusterer", origin, made_with, certificate=certificate, files=[TOP_TERMS]),
        centres_KD=found.centres_KD,
        prices_K=np.zeros(plan.k),
        loads_K=found.loads_K,
    )


def write_terms(out: Path, files: Files, sample: Sample, found: second.Round, seal: str) -> None:
    """Write the terms that set the new clusters apart."""
    k = len(found.loads_K)
    idf_V = vector_files.term_weights(files.vectors.with_name("embedder.npz"), files.shards, sample.counts)
    tokenizer = shard_files.tokenizer(files.tokenizer, files.shards)
    terms = describe(sample, idf_V, found.labels_N[sample.counted], k, tokenizer)
    for cluster, cluster_terms in enumerate(terms):
        cli.log.info("cluster %d: %s", cluster, " ".join(cluster_terms))
    artifact.write_sealed(out, artifact.make_meta("top_terms", {"clusterer": seal}, top_terms=terms))


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--vectors", required=True, type=Path, help="embed/manifest.json")
    p.add_argument(
        "--assignments", required=True, type=Path, help="assignments/manifest.json, of the first round"
    )
    p.add_argument("--scores", required=True, type=Path, nargs="+", help="of score_training, in any order")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument("--out", required=True, type=Path, help="second/manifest.json; other files go beside it")
    p.add_argument("--threads", type=int, default=1, help="shards read and written at the same time")
    args = p.parse_args(argv)
    cli.start_logging("second_round", args.log)

    cfg = config.read(args.config)
    plan, names = plans.second_round(cfg), plan_first.firsts(cfg)
    files = Files(args.shards, args.vectors, args.assignments, args.scores, args.tokenizer)
    shards, first = (
        artifact.read_sealed(args.shards, "shards"),
        artifact.read_sealed(args.assignments, "assignments"),
    )
    artifact.check_made_from(args.assignments, first, "shards", shards["identity_train"])
    nll_NK, records = read_scores(files, names, shards, first)
    sample = read_sample(args.vectors, args.shards, plan.fit_documents, plan.rng_seed)
    weights_N = regroup.weights(sample.n_tokens_N, plan.balance)
    found = second.deal(sample.x_ND, nll_NK, weights_N, plan.balance != "none")

    origin = made_from.second_clusterer(artifact.read_sealed(args.vectors, "vectors"), first, records)
    seal = write_clusterer(args.out.with_name(CLUSTERER), found, plan, origin)
    write_terms(args.out.with_name(TOP_TERMS), files, sample, found, seal)
    train = shard_files.entries(args.shards, shards, "train")
    selection = heldout.select_validation(args.shards, shards, plan.validation_share, plan.rng_seed)
    documents = heldout.read_validation(args.shards, selection)
    of_validation = regroup.clusters_of(
        args.shards, args.vectors, found.centres_KD, np.zeros(plan.k), selection, documents
    )
    identities = made_from.second_round(shards, {"seal": seal, "made_from": origin})
    grouping = by_score(files, plan, shards, found, identities)
    grouping.settings["second_round"]["flops"] = sum(record["flops"] for record in records.values())
    regroup.write(args.shards, train, args.out, grouping, Validation(documents, of_validation), args.threads)


if __name__ == "__main__":
    cli.run(main)
