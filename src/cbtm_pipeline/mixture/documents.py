"""documents.parquet: one row for each held-out document, for other programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_pipeline.base import artifact
from cbtm_pipeline.mixture.by_label import Labelled
from cbtm_pipeline.mixture.scored import Scored

NAME = "documents.parquet"  # beside metrics.json


class Columns(NamedTuple):
    """The documents, which of them chose settings (D,), and the nll of each under each model (D,), nats."""

    held_out: Scored
    chosen_D: np.ndarray
    nll_D: Mapping[str, np.ndarray]


def write(
    path: Path, columns: Columns, made_from: Mapping[str, str], labelled: Labelled | None = None
) -> None:
    """Write the file. Its rows are those of route/distances.npz. With `labelled`, it has a column of labels.

    `n_tokens` counts the scored tokens, `nll_<model>` sums over them. So exp(sum(nll_0) / sum(n_tokens)) is
    the perplexity of expert 0 on any set of rows.
    """
    found = columns.held_out
    table = {
        "doc_id": pa.array(found.doc_id_D.tolist(), pa.string()),
        **({"label": pa.array(labelled.label_D.tolist(), pa.string())} if labelled else {}),
        "cluster": pa.array(found.cluster_D, pa.int32()),
        "used_for": pa.array(np.where(columns.chosen_D, "calibration", "report").tolist(), pa.string()),
        "n_tokens": pa.array(found.n_tokens_D, pa.int32()),
        "n_bytes": pa.array(found.n_bytes_D, pa.int64()),
        **{f"nll_{name}": pa.array(nll_D, pa.float64()) for name, nll_D in columns.nll_D.items()},
    }
    record = json.dumps(artifact.make_meta("held_out_documents", made_from), sort_keys=True)
    meta: dict[bytes | str, bytes | str] = {"cbtm": record}
    with artifact.publish(path) as tmp:
        whole = pa.table(table).replace_schema_metadata(meta)
        pq.write_table(whole, tmp, compression="zstd", write_page_checksum=True)
