"""Passes over labelled training documents, shard by shard, for clusters that follow labels (`labelled`)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cbtm_pipeline.base import artifact
from cbtm_pipeline.clustering import labelled, regroup
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import vectors as vector_files


def weights(shards: Path, balance: str) -> dict[str, float]:
    """The weight of each label in the balance, over all training documents that have one."""
    found: dict[str, float] = defaultdict(float)
    manifest = artifact.read_sealed(shards, "shards")
    for entry in shard_files.entries(shards, manifest, "train"):
        weights_N = _weights(shards, entry, balance)
        names, numbers_N = np.unique(shard_files.labels(shards.parent, entry), return_inverse=True)
        for name, weight in zip(names.tolist(), np.bincount(numbers_N, weights_N).tolist(), strict=True):
            found[name] += weight
    return {name: weight for name, weight in found.items() if name}


def chunks(shards: Path, vectors: Path, balance: str) -> Iterator[labelled.Chunk]:
    """The vectors, weights and labels of all training documents, a shard at a time.

    Raises ValueError for vectors that were made from other shards.
    """
    manifest, about = artifact.read_sealed(shards, "shards"), vector_files.read_manifest(vectors, shards)
    entries = shard_files.entries(shards, manifest, "train")
    for entry, of_vectors in zip(entries, about["shards"], strict=True):
        x_ND = vector_files.read(vectors.parent, of_vectors)
        yield x_ND, _weights(shards, entry, balance), shard_files.labels(shards.parent, entry)


def _weights(shards: Path, entry: shard_files.Entry, balance: str) -> np.ndarray:
    n_tokens_N = shard_files.attributes(shards.parent, entry, ["n_tokens"])["n_tokens"].to_numpy()
    return regroup.weights(n_tokens_N, balance).astype(np.float64)
