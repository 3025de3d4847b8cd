"""Embed the training documents: write the vectors of every training shard.

    python -m cbtm_pipeline.embed --config config.yaml --shards results/shards/manifest.json --out results/embed/manifest.json

The embedder is the linear tf-idf of `tfidf`, fitted on a sample, or the encoder that embed.encoder names. Writes embedder.npz, one .npy per
training shard, and the manifest last. Memory holds a few shards and the sample, whatever the corpus.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli, parallel
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import encoder, encoder_files, tfidf

CHUNK_TEXTS = 512  # that an encoder sorts by length at once

Embedder = tfidf.Embedder | encoder.Encoder


def fit(
    folder: Path, manifest: dict[str, Any], train: list[shard_files.Entry], how: dict[str, Any], n_threads: int
) -> tuple[tfidf.Embedder, int]:
    """The embedder of a corpus, and the number of documents that it was fitted on. `how`: the parameters of rule embed."""

    def count(drawn: tuple[shard_files.Entry, np.ndarray]) -> sparse.csr_array:
        entry, rows = drawn
        return tfidf.count(shard_files.documents(folder, entry).take(rows), manifest["vocab_size"])

    with ThreadPoolExecutor(n_threads) as pool:
        counts = list(parallel.in_order(pool, count, shard_files.sample(train, how["fit_documents"], how["rng_seed"]), n_threads))
    counts_NV = sparse.csr_array(sparse.vstack(counts, "csr"))
    del counts
    fit_keys = ("n_components", "idf_power", "max_df", "min_df", "rng_seed")
    embedder = tfidf.fit(counts_NV, separator_id=manifest["separator_id"], **{key: how[key] for key in fit_keys})
    return embedder, len(counts_NV.indptr) - 1


def texts(folder: Path, entry: shard_files.Entry) -> Iterator[list[str]]:
    """The texts of a shard, CHUNK_TEXTS at a time. Raises ValueError for a file that is damaged or another than the manifest's."""
    path, n = folder / f"{entry['name']}.parquet", 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK_TEXTS, columns=["text"]):
                n += len(batch)
                yield batch["text"].to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: unreadable ({error}). Expected the column text. Run shard again.") from error
    if n != entry["n_documents"]:
        raise ValueError(f"{path}: {n} rows. Expected {entry['n_documents']}, as in the manifest. Run shard again.")


def vectors(folder: Path, entry: shard_files.Entry, embedder: Embedder) -> Iterator[np.ndarray]:
    """Embeddings of a shard's documents in one or more chunks, float32 (rows, D), of length one or zero."""
    if isinstance(embedder, tfidf.Embedder):
        yield tfidf.embed(shard_files.documents(folder, entry), embedder.E_VD)
    else:
        yield encoder.embed(embedder, [])
        for chunk in texts(folder, entry):
            yield encoder.embed(embedder, chunk)


def write_vectors(path: Path, h_ND: np.ndarray) -> None:
    """Write vectors as .npy, whole or not at all."""
    with artifact.publish(path) as tmp, tmp.open("wb") as file:
        np.save(file, h_ND, allow_pickle=False)


def write_all(
    folder: Path, train: list[shard_files.Entry], out: Path, embedder: Embedder, n_components: int, n_threads: int
) -> list[dict[str, Any]]:
    """Write the vectors of every shard; return what the manifest says of them. An encoder takes one shard after the other."""
    progress = cli.Progress("embedded", sum(entry["n_documents"] for entry in train), "documents")

    def write(entry: shard_files.Entry) -> dict[str, Any]:
        path, h = out.with_name(f"{entry['name']}.npy"), [np.empty((0, n_components), np.float32)]
        for h_ND in vectors(folder, entry, embedder):
            h.append(h_ND)
            progress.add(len(h_ND))
        write_vectors(path, np.concatenate(h))
        return {"name": entry["name"], "n_documents": entry["n_documents"], "identity": artifact.identity(path)}

    if isinstance(embedder, encoder.Encoder):
        return [write(entry) for entry in train]
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # the shards are the parallelism
        return list(parallel.in_order(pool, write, train, n_threads))


def read_vectors(folder: Path, entry: shard_files.Entry) -> np.ndarray:
    """Memory-map the vectors (float32, (n_documents, D)) of an entry of embed/manifest.json. Raises ValueError if the file is another."""
    path = folder / f"{entry['name']}.npy"
    shard_files.check_file(path, entry["identity"], "embed")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read(path: Path, shards: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The arrays of embedder.npz, and what it says of the encoder if there is one."""
    arrays, meta = artifact.read_npz(path, "embedder")
    artifact.check_made_from(path, meta, "shards", artifact.identity(shards))
    return arrays, meta.get("encoder")


def read_embedder(path: Path, shards: Path) -> Embedder:
    """Read embedder.npz, and load the encoder that it names. Raises ValueError unless it was made for the corpus of shards/manifest.json,
    and with the encoder that is there now."""
    arrays, about = _read(path, shards)
    if about is None:
        return tfidf.Embedder(**arrays)
    loaded = encoder_files.load(about["name"], about["n_windows"])
    if loaded.identity != about["identity"]:
        raise ValueError(
            f"embed.encoder: {loaded.name}: its files have changed ({loaded.identity}). Expected those that the vectors were made with, "
            f"{about['identity']}. Bring them back, or run embed again: snakemake --cores 2 --force {path}"
        )
    return loaded


def term_weights(path: Path, shards: Path, counts_NV: sparse.csr_array) -> np.ndarray:
    """Weight of each term, (V,): that of the embedder in embedder.npz. An encoder has none: idf in these counts, or zero for a term of one
    document or of more than half of them."""
    arrays, about = _read(path, shards)
    if about is None:
        return arrays["idf_V"]
    from sklearn.feature_extraction.text import TfidfTransformer  # takes a second, and only this needs it

    n, vocab_size = counts_NV.shape  # pyright: ignore[reportGeneralTypeIssues]
    df_V = np.bincount(counts_NV.indices, minlength=vocab_size)
    return np.where((df_V > 1) & (df_V <= n / 2), TfidfTransformer().fit(counts_NV).idf_, 0).astype(np.float32)


def read_manifest(path: Path, shards: Path) -> dict[str, Any]:
    """Read embed/manifest.json. Raises ValueError unless its vectors belong to the corpus of shards/manifest.json."""
    manifest = artifact.read_json(path, "vectors")
    artifact.check_made_from(path, manifest, "shards", artifact.identity(shards))
    return manifest


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--out", required=True, type=Path, help="embed/manifest.json; the vectors and embedder.npz go beside it")
    p.add_argument("--threads", type=int, default=1, help="shards embedded at the same time")
    args = p.parse_args()
    cli.start_logging("embed", args.log)

    how = config.parameters(config.read(args.config), "embed")
    manifest, folder = artifact.read_json(args.shards, "shards"), args.shards.parent
    train = shard_files.entries(args.shards, manifest, "train")
    made_from = {"shards": artifact.identity(args.shards)}
    embedder_path = args.out.with_name("embedder.npz")
    if "encoder" in how:
        embedder = encoder_files.load(how["encoder"], how["windows"])
        n_components, about = embedder.n_components, {key: getattr(embedder, key) for key in ("name", "identity", "n_windows")}
        artifact.write_npz(embedder_path, artifact.make_meta("embedder", made_from, encoder=about))
    else:
        began = time.monotonic()
        embedder, n_fitted = fit(folder, manifest, train, how, args.threads)
        n_terms, n_components = int(np.count_nonzero(embedder.idf_V)), embedder.E_VD.shape[1]
        artifact.write_npz(embedder_path, artifact.make_meta("embedder", made_from, n_fitted=n_fitted), **embedder._asdict())
        seconds = time.monotonic() - began
        cli.log.info("fitted on %d documents in %.1f s: %d terms, %d components", n_fitted, seconds, n_terms, n_components)

    made_from["embedder"] = artifact.identity(embedder_path)
    written = write_all(folder, train, args.out, embedder, n_components, args.threads)
    artifact.write_json(args.out, artifact.make_meta("vectors", made_from, shards=written, n_components=n_components))
    cli.log.info("wrote the vectors of %d shards", len(written))


if __name__ == "__main__":
    cli.run(main)
