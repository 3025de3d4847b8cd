"""The held-out documents that tell, while a training runs, how well it goes: its validation loss.

They are the first of the documents on which the router's settings are chosen later (`sweep.calibration_documents`), so that nothing that
is decided by their loss, such as when to end a training, is reported on. `assign` writes them as it writes training shards, in one group
for each cluster; the seed and the dense models read them all.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import shard_files, token_files
from cbtm_pipeline.mixture import sweep
from cbtm_pipeline.training import batches

NAME = "validation.arrow"  # beside manifest.json of the assignments
MOST = 10_000  # documents


def rows(shards: Path, manifest: dict[str, Any], share: float, rng_seed: int) -> list[tuple[shard_files.Entry, np.ndarray]]:
    """Which rows of which held-out shards: `share` of their documents, at most MOST, those with the smallest keyed hash of their id.

    `shards` is the path of the manifest.
    """
    entries = [entry for entry in shard_files.entries(shards, manifest, "eval") if entry["n_documents"]]
    n = sum(entry["n_documents"] for entry in entries)
    share = min(share, MOST / n)
    if round(share * n) == 0 or n < 2:
        return []
    ids = [shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist() for entry in entries]
    mask_D = sweep.calibration_documents([doc_id for some in ids for doc_id in some], share, rng_seed)
    starts = np.cumsum([0, *map(len, ids)])
    return [(entry, np.flatnonzero(mask_D[a:b])) for entry, a, b in zip(entries, starts[:-1], starts[1:], strict=True) if mask_D[a:b].any()]


def documents(shards: Path, chosen: list[tuple[shard_files.Entry, np.ndarray]]) -> list[token_files.Documents]:
    """The token ids of these rows, shard by shard. Raises ValueError for a shard that is not the manifest's."""
    return [shard_files.documents(shards.parent, entry).take(taken) for entry, taken in chosen]


def write(out: Path, some: list[token_files.Documents], labels: list[np.ndarray], k: int, made_from: dict[str, str]) -> None:
    """Write documents in k groups by their labels, beside the manifest `out`."""
    together = token_files.join(some)
    labels_N = np.concatenate(labels)
    groups = (together.take(np.flatnonzero(labels_N == j)) for j in range(k))
    token_files.write(out.with_name(NAME), artifact.make_meta("tokens", made_from), groups)


def stream(manifest_path: Path, manifest: dict[str, Any], plan: dict[str, Any]) -> batches.Stream | None:
    """What an expert is validated on; None where its cluster has no such document. `plan` and `manifest` are those of its training.

    Raises ValueError for a file that is not the manifest's.
    """
    if not plan["validations"] or not plan["validation_share"]:
        return None
    if plan["data"] == "corpus":
        some = documents(manifest_path, rows(manifest_path, manifest, plan["validation_share"], plan["rng_seed"]))
        segments = [shard.values for shard in some]
    elif manifest["identity_validation"] is None:
        segments = []
    else:
        path = manifest_path.with_name(NAME)
        shard_files.check_file(path, manifest["identity_validation"], "assign")
        segments = [token_files.read(path, plan["group"]).values]
    return batches.Stream(segments) if any(len(segment) for segment in segments) else None
