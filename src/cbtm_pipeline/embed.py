"""Embed the training documents: write the vectors of every training shard.

    python -m cbtm_pipeline.embed --config config.yaml --shards results/shards/manifest.json \\
        --out results/embed/manifest.json

The embedder is the linear tf-idf of `tfidf`, fitted on a sample, or the encoder that embed.encoder names.
Writes embedder.npz, one .npy per training shard, and the manifest last. Memory holds a few shards and the
sample, whatever the size of the corpus.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, parallel
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import encoder, encoder_files, tfidf, vectors
from cbtm_pipeline.plan import EncoderPlan, TfidfPlan
from cbtm_pipeline.provenance import made_from


def fit(
    folder: Path, manifest: dict[str, Any], train: list[shard_files.Entry], plan: TfidfPlan, n_threads: int
) -> tuple[tfidf.Embedder, int]:
    """The embedder of a corpus, and the number of documents that it was fitted on."""

    def count(drawn: tuple[shard_files.Entry, np.ndarray]) -> sparse.csr_array:
        entry, rows = drawn
        return tfidf.count(shard_files.documents(folder, entry).take(rows), manifest["vocab_size"])

    sample = shard_files.sample(train, plan.fit_documents, plan.rng_seed)
    with ThreadPoolExecutor(n_threads) as pool:
        counts = list(parallel.in_order(pool, count, sample, n_threads))
    counts_NV = sparse.csr_array(sparse.vstack(counts, "csr"))
    del counts
    embedder = tfidf.fit(
        counts_NV,
        separator_id=manifest["separator_id"],
        n_components=plan.n_components,
        idf_power=plan.idf_power,
        max_df=plan.max_df,
        min_df=plan.min_df,
        rng_seed=plan.rng_seed,
    )
    return embedder, len(counts_NV.indptr) - 1


def write_tfidf(
    path: Path,
    shards: Path,
    manifest: dict[str, Any],
    train: list[shard_files.Entry],
    plan: TfidfPlan,
    n_threads: int,
) -> tuple[tfidf.Embedder, int]:
    """Fit the linear tf-idf and write it to `path`. Returns it, and its number of dimensions."""
    began = time.monotonic()
    embedder, n_fitted = fit(shards.parent, manifest, train, plan, n_threads)
    meta = artifact.make_meta("embedder", made_from.embed(manifest), plan.content(), n_fitted=n_fitted)
    artifact.write_npz(path, meta, **embedder._asdict())
    seconds, n_components = time.monotonic() - began, embedder.E_VD.shape[1]
    found = f"{np.count_nonzero(embedder.idf_V)} terms, {n_components} components"
    cli.log.info("fitted on %d documents in %.1f s: %s", n_fitted, seconds, found)
    return embedder, n_components


def write_encoder(path: Path, manifest: dict[str, Any], plan: EncoderPlan) -> tuple[encoder.Encoder, int]:
    """Load the encoder and write its name, commit and identity to `path`.

    Returns it, and its number of dimensions.
    """
    loaded = encoder_files.load(plan.encoder, plan.windows, plan.revision)
    record = {key: getattr(loaded, key) for key in ("name", "identity", "n_windows", "commit")}
    about = record | {"revision": plan.revision}
    meta = artifact.make_meta("embedder", made_from.embed(manifest), plan.content(), encoder=about)
    artifact.write_npz(path, meta)
    return loaded, loaded.n_components


def write_all(
    folder: Path,
    train: list[shard_files.Entry],
    out: Path,
    embedder: vectors.Embedder,
    n_components: int,
    n_threads: int,
) -> list[dict[str, Any]]:
    """Write the vectors of every shard, and return their entries for the manifest.

    An encoder takes one shard after the other.
    """
    progress = cli.Progress("embedded", sum(entry["n_documents"] for entry in train), "documents")

    def write(entry: shard_files.Entry) -> dict[str, Any]:
        path, chunks = out.with_name(f"{entry['name']}.npy"), [np.empty((0, n_components), np.float32)]
        for h_ND in vectors.embed(folder, entry, embedder):
            chunks.append(h_ND)
            progress.add(len(h_ND))
        vectors.write(path, np.concatenate(chunks))
        n_documents = entry["n_documents"]
        return {"name": entry["name"], "n_documents": n_documents, "identity": artifact.identity(path)}

    if isinstance(embedder, encoder.Encoder):
        return [write(entry) for entry in train]
    # many shards at once, so each uses one thread of torch
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(parallel.in_order(pool, write, train, n_threads))


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument(
        "--out",
        required=True,
        type=Path,
        help="embed/manifest.json; the vectors and embedder.npz go beside it",
    )
    p.add_argument("--threads", type=int, default=1, help="shards embedded at the same time")
    args = p.parse_args()
    cli.start_logging("embed", args.log)

    plan = plans.embed(config.read(args.config))
    manifest = artifact.read_sealed(args.shards, "shards")
    train = shard_files.entries(args.shards, manifest, "train")
    path = args.out.with_name("embedder.npz")
    if isinstance(plan, EncoderPlan):
        embedder, n_components = write_encoder(path, manifest, plan)
    else:
        embedder, n_components = write_tfidf(path, args.shards, manifest, train, plan, args.threads)

    written = write_all(args.shards.parent, train, args.out, embedder, n_components, args.threads)
    about = {"shards": written, "n_components": n_components}
    about["files"] = [path.name, *(f"{entry['name']}.npy" for entry in written)]
    identities = made_from.vectors(manifest, artifact.read_record(path, "embedder"))
    artifact.write_sealed(args.out, artifact.make_meta("vectors", identities, plan.content(), **about))
    cli.log.info("wrote the vectors of %d shards", len(written))


if __name__ == "__main__":
    cli.run(main)
