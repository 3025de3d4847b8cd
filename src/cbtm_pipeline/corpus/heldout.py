"""Which held-out tokens are scored: the one place where `score_expert`, `route` and `eval_ensemble` agree on rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline.corpus import token_files


def documents(shards: Path, manifest: dict[str, Any], max_document_tokens: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (shard name, `[sep, x_0, ..., x_(n-1)]`) of every held-out document, cut to its first `max_document_tokens` tokens x.

    `shards` is the folder of the manifest. Raises ValueError when nothing is held out.
    """
    entries = [s for s in manifest["shards"] if s["split"] == "eval" and s["n_documents"]]
    if not entries:
        raise ValueError(
            f"{shards}/manifest.json: no held-out documents. Expected at least one. Raise corpus.eval_fraction or set corpus.eval."
        )
    for entry in entries:
        group = token_files.read(shards / f"{entry['name']}.arrow", 0)
        for i in range(len(group)):
            document = group.values[group.offsets[i] : group.offsets[i + 1]]
            yield (
                entry["name"],
                document if max_document_tokens is None else document[: max_document_tokens + 1],
            )
