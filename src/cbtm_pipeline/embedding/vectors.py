"""Vectors of documents: either embedder makes them, and later rules read them back.

Shapes: N documents, D dimensions, V terms.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import encoder, encoder_files, tfidf

CHUNK_TEXTS = 512  # that an encoder sorts by length at once
Embedder = tfidf.Embedder | encoder.Encoder


def texts(folder: Path, entry: shard_files.Entry) -> Iterator[list[str]]:
    """The texts of a shard, CHUNK_TEXTS at a time.

    Raises ValueError for texts that are not those of the manifest.
    """
    for batch in shard_files.batches(folder, entry, ["text"], CHUNK_TEXTS):
        yield batch["text"].to_pylist()


def embed(folder: Path, entry: shard_files.Entry, embedder: Embedder) -> Iterator[np.ndarray]:
    """Embeddings of a shard's documents in one or more chunks, float32 (rows, D), of length one or zero."""
    if isinstance(embedder, tfidf.Embedder):
        yield tfidf.embed(shard_files.documents(folder, entry), embedder.E_VD)
    else:
        yield encoder.embed(embedder, [])  # so that an empty shard has a chunk, too
        for chunk in texts(folder, entry):
            yield encoder.embed(embedder, chunk)


def write(path: Path, h_ND: np.ndarray) -> None:
    """Write vectors as .npy. After a crash, the file is either complete or absent."""
    with artifact.publish(path) as tmp, tmp.open("wb") as file:
        np.save(file, h_ND, allow_pickle=False)


def read(folder: Path, entry: shard_files.Entry) -> np.ndarray:
    """Memory-map the vectors (float32, (n_documents, D)) of an entry of embed/manifest.json.

    Raises ValueError if the file is not the manifest's.
    """
    path = folder / f"{entry['name']}.npy"
    artifact.check_file(path, entry["identity"], partial(make_again, folder / "manifest.json"))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read(path: Path, shards: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The arrays of embedder.npz, and its record of the encoder; None for linear tf-idf."""
    arrays, meta = artifact.read_npz(path, "embedder")
    artifact.check_made_from(path, meta, "shards", artifact.read_sealed(shards, "shards")["identity_train"])
    return arrays, meta.get("encoder")


def read_embedder(path: Path, shards: Path) -> Embedder:
    """Read embedder.npz, and load the encoder that it names.

    Raises ValueError if it was made for another corpus than that of shards/manifest.json, or if the files of
    the encoder have changed.
    """
    arrays, record = _read(path, shards)
    if record is None:
        return tfidf.Embedder(**arrays)
    loaded = encoder_files.load(record["name"], record["n_windows"], record.get("revision"))
    if loaded.identity != record["identity"]:
        raise ValueError(
            f"embed.encoder: {loaded.name}: its files have changed ({loaded.identity}). "
            f"Expected those that the vectors were made with, {record['identity']}. "
            f"Bring them back. {make_again(path)}"
        )
    return loaded


def term_weights(path: Path, shards: Path, counts_NV: sparse.csr_array) -> np.ndarray:
    """Weight of each term, (V,), from the embedder in embedder.npz.

    An encoder has no weights of terms. Then it is the idf in these counts, and zero for a term of one
    document or of more than half of them.
    """
    arrays, record = _read(path, shards)
    if record is None:
        return arrays["idf_V"]
    from sklearn.feature_extraction.text import TfidfTransformer  # takes a second, and only encoders need it

    n, vocab_size = counts_NV.shape  # pyright: ignore[reportGeneralTypeIssues]
    df_V = np.bincount(counts_NV.indices, minlength=vocab_size)
    idf_V = TfidfTransformer().fit(counts_NV).idf_
    return np.where((df_V > 1) & (df_V <= n / 2), idf_V, 0).astype(np.float32)


def read_manifest(path: Path, shards: Path) -> dict[str, Any]:
    """Read embed/manifest.json.

    Raises ValueError if its vectors belong to another corpus than that of shards/manifest.json.
    """
    manifest = artifact.read_sealed(path, "vectors")
    identity = artifact.read_sealed(shards, "shards")["identity_train"]
    artifact.check_made_from(path, manifest, "shards", identity)
    return manifest
