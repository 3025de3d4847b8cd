"""Embed the training documents: fit the linear tf-idf embedder on a sample, then write the vectors of every training shard.

    python -m cbtm_pipeline.embed --config config.yaml --shards results/shards/manifest.json --out results/embed/manifest.json

Writes embedder.npz, one .npy per training shard, and the manifest last. Memory holds one shard and the sample, whatever the corpus.
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from cbtm_pipeline import artifact, cli, config, corpus, tfidf


def fit(folder: Path, manifest: dict[str, Any], train: list[corpus.Entry], how: dict[str, Any]) -> tuple[tfidf.Embedder, int]:
    """The embedder of a corpus, and the number of documents that it was fitted on. `how`: the parameters of rule embed."""
    counts = []
    for entry, rows in corpus.sample(train, how["fit_documents"], how["rng_seed"]):
        counts.append(tfidf.count(corpus.documents(folder, entry).take(rows), manifest["vocab_size"]))
    counts_NV = sparse.csr_array(sparse.vstack(counts, "csr"))
    del counts
    fit_keys = ("n_components", "idf_power", "max_df", "min_df", "rng_seed")
    embedder = tfidf.fit(counts_NV, separator_id=manifest["separator_id"], **{key: how[key] for key in fit_keys})
    return embedder, len(counts_NV.indptr) - 1


def write_vectors(path: Path, h_ND: np.ndarray) -> None:
    """Write vectors as .npy, whole or not at all."""
    with artifact.publish(path) as tmp, tmp.open("wb") as file:
        np.save(file, h_ND, allow_pickle=False)


def read_vectors(folder: Path, entry: corpus.Entry) -> np.ndarray:
    """Memory-map the vectors (float32, (n_documents, D)) of an entry of embed/manifest.json. Raises ValueError if the file is another."""
    path = folder / f"{entry['name']}.npy"
    corpus.check_file(path, entry["identity"], "embed")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_embedder(path: Path, shards: Path) -> tfidf.Embedder:
    """Read embedder.npz. Raises ValueError unless it was fitted on the corpus of shards/manifest.json."""
    arrays, meta = artifact.read_npz(path, "embedder")
    artifact.check_made_from(path, meta, "shards", artifact.identity(shards))
    return tfidf.Embedder(**arrays)


def read_manifest(path: Path, shards: Path) -> dict[str, Any]:
    """Read embed/manifest.json. Raises ValueError unless its vectors belong to the corpus of shards/manifest.json."""
    manifest = artifact.read_json(path, "vectors")
    artifact.check_made_from(path, manifest, "shards", artifact.identity(shards))
    return manifest


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--out", required=True, type=Path, help="embed/manifest.json; the vectors and embedder.npz go beside it")
    args = p.parse_args()
    cli.start_logging("embed", args.log)

    how = config.parameters(config.read(args.config), "embed")
    manifest, folder = artifact.read_json(args.shards, "shards"), args.shards.parent
    train = corpus.entries(args.shards, manifest, "train")
    embedder, n_fitted = fit(folder, manifest, train, how)
    made_from = {"shards": artifact.identity(args.shards)}
    embedder_path = args.out.with_name("embedder.npz")
    artifact.write_npz(embedder_path, artifact.make_meta("embedder", made_from, n_fitted=n_fitted), **embedder._asdict())
    n_terms, n_components = int(np.count_nonzero(embedder.idf_V)), embedder.E_VD.shape[1]
    cli.log.info("fitted on %d documents: %d terms, %d components", n_fitted, n_terms, n_components)

    made_from["embedder"] = artifact.identity(embedder_path)
    progress = cli.Progress("embedded", sum(entry["n_documents"] for entry in train), "documents")
    written = []
    for entry in train:
        path = args.out.with_name(f"{entry['name']}.npy")
        write_vectors(path, tfidf.embed(corpus.documents(folder, entry), embedder.E_VD))
        written.append({"name": entry["name"], "n_documents": entry["n_documents"], "identity": artifact.identity(path)})
        progress.add(entry["n_documents"])
    artifact.write_json(args.out, artifact.make_meta("vectors", made_from, shards=written, n_components=n_components))
    cli.log.info("wrote the vectors of %d shards", len(written))


if __name__ == "__main__":
    cli.run(main)
