"""Held-out text: the tokens to score, the documents that choose settings, and those that validate a training.

`score_expert` and `route` agree on rows because both read `documents`.

The validation documents are the first of the calibration documents, which choose the router's settings later.
So no reported result includes a document whose loss has decided something, such as the end of a training.
`assign` writes the validation documents in one group for each cluster. The seed and the dense models read all
of them.

Shapes: D documents.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import shard_files, token_files

VALIDATION_FILE = "validation.arrow"  # beside manifest.json of the assignments
MAX_VALIDATION_DOCUMENTS = 10_000
MIN_DOCUMENTS = 2  # held out: one to choose the router's settings, one to report
MIN_REPORTED = 10  # with fewer reported documents, resampling them says nothing of the text they stand for

Selection = list[tuple[shard_files.Entry, np.ndarray]]  # held-out shards, and the rows selected in each


def documents(
    shards: Path, manifest: dict[str, Any], max_document_tokens: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (shard name, `[sep, x_0, ..., x_(n-1)]`) of every held-out document.

    A document is cut to its first `max_document_tokens` tokens x. `shards` is the folder of the manifest.
    Raises ValueError when nothing is held out, or for a file that is not the manifest's.
    """
    entries = [s for s in manifest["shards"] if s["split"] == "eval" and s["n_documents"]]
    if not entries:
        raise ValueError(
            f"{shards}/manifest.json: no held-out documents. Expected at least one. "
            "Raise corpus.eval_fraction or set corpus.eval."
        )
    for entry in entries:
        group = shard_files.documents(shards, entry)
        for i in range(len(group)):
            document = group.values[group.offsets[i] : group.offsets[i + 1]]
            if max_document_tokens is not None:
                document = document[: max_document_tokens + 1]
            yield entry["name"], document


def check_enough(n_documents: int) -> None:
    """Raise ValueError if so many held-out documents are too few for a result."""
    if n_documents < MIN_DOCUMENTS:
        raise ValueError(
            f"corpus.eval: {n_documents} held-out document{'s' * (n_documents != 1)}. Expected at least "
            f"{MIN_DOCUMENTS}: one to choose the router's settings and one to report. Give more held-out "
            "documents or raise corpus.eval_fraction."
        )


def warning(n_documents: int, calibration_share: float) -> str | None:
    """What a result of so many held-out documents will lack; None if it lacks nothing."""
    n_reported = n_documents - n_calibration(n_documents, calibration_share)
    if n_reported >= MIN_REPORTED:
        return None
    return (
        f"{n_documents} held-out documents, of which {n_reported} are reported: the result will have no "
        f"intervals and no verdict. Expected at least {MIN_REPORTED} reported ones. Give more held-out "
        "documents or raise corpus.eval_fraction."
    )


def n_calibration(n_documents: int, share: float) -> int:
    """How many of the held-out documents choose settings: at least one, and not all."""
    return min(max(1, round(share * n_documents)), n_documents - 1)


def calibration_documents(doc_ids: Iterable[str], share: float, rng_seed: int) -> np.ndarray:
    """Mask (bool, (D,)) of the calibration documents: the `share` of all documents that choose settings.

    They have the smallest keyed hashes of their ids. At least one document is in the mask, and at least one
    is not. Raises ValueError for fewer than two documents.
    """
    key = str(rng_seed).encode()
    hashes = [hashlib.blake2b(str(doc_id).encode(), digest_size=16, key=key).digest() for doc_id in doc_ids]
    check_enough(len(hashes))
    mask_D = np.zeros(len(hashes), bool)
    mask_D[sorted(range(len(hashes)), key=lambda i: (hashes[i], i))[: n_calibration(len(hashes), share)]] = (
        True
    )
    return mask_D


def select_validation(shards: Path, manifest: dict[str, Any], share: float, rng_seed: int) -> Selection:
    """Select `share` of the held-out documents, at most MAX_VALIDATION_DOCUMENTS, to validate trainings.

    They have the smallest keyed hashes of their ids. Selects none if the share rounds to no document, or if
    there are fewer than two documents. `shards` is the path of the manifest.
    """
    entries = [entry for entry in shard_files.entries(shards, manifest, "eval") if entry["n_documents"]]
    n = sum(entry["n_documents"] for entry in entries)
    share = min(share, MAX_VALIDATION_DOCUMENTS / n)
    if round(share * n) == 0 or n < 2:
        return []
    ids = [
        shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist() for entry in entries
    ]
    mask_D = calibration_documents([doc_id for of_shard in ids for doc_id in of_shard], share, rng_seed)
    starts = np.cumsum([0, *map(len, ids)])
    ranges = zip(entries, starts[:-1], starts[1:], strict=True)
    return [(entry, np.flatnonzero(mask_D[a:b])) for entry, a, b in ranges if mask_D[a:b].any()]


def read_validation(shards: Path, selection: Selection) -> list[token_files.Documents]:
    """The token ids of the selected documents, one item per shard.

    Raises ValueError for a shard that is not the manifest's.
    """
    return [shard_files.documents(shards.parent, entry).take(rows) for entry, rows in selection]


def write_validation(
    out: Path,
    documents: list[token_files.Documents],
    labels: list[np.ndarray],
    k: int,
    made_from: dict[str, str],
) -> list[str]:
    """Write validation documents in k groups by their labels, beside the manifest `out`.

    Returns the identity of each group.
    """
    joined = token_files.join(documents)
    labels_D = np.concatenate(labels)
    groups = (joined.take(np.flatnonzero(labels_D == j)) for j in range(k))
    return token_files.write(out.with_name(VALIDATION_FILE), artifact.make_meta("tokens", made_from), groups)
