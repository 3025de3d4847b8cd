"""The result by the labels of the held-out documents: where the ensemble gains, and what its clusters are.

Labels serve this alone: no router sees one.

Shapes: D documents.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.corpus import labels, shard_files
from cbtm_pipeline.mixture import bootstrap
from cbtm_pipeline.mixture.scored import Scored


class Labelled(NamedTuple):
    """The label of each held-out document (D,), and the agreement of the clusters with training documents."""

    field: str  # corpus.label_field
    label_D: np.ndarray
    training: dict[str, Any]  # n_labels, purity, nmi

    def take(self, documents: np.ndarray) -> "Labelled":
        """The documents with these indices."""
        return self._replace(label_D=self.label_D[documents])


Manifest = tuple[Path, dict[str, Any]]  # with its path


def read(field: str, of_shards: Manifest, of_clusters: Manifest) -> Labelled:
    """The labels of the held-out documents, in the order of the scores.

    Raises ValueError if a manifest has no labels.
    """
    (shards, manifest), (path, assignments) = of_shards, of_clusters
    entries = shard_files.entries(shards, manifest, "eval")
    if shard_files.identity_labels(entries) is None:
        raise ValueError(f"{shards}: no labels. Expected those of corpus.label_field. {make_again(shards)}")
    if "labels" not in assignments:
        raise ValueError(f"{path}: no labels. Expected those of corpus.label_field. {make_again(path)}")
    found = [name for entry in entries for name in shard_files.labels(shards.parent, entry)]
    training = {key: assignments["labels"][key] for key in ("n_labels", "purity", "nmi")}
    return Labelled(field, np.array(found, object), training)


class Systems(NamedTuple):
    """The nll of each document in nats (D,): of the best mixture, and of the dense models by name."""

    ensemble: np.ndarray
    dense: Mapping[str, np.ndarray]


def content(
    labelled: Labelled, reported: Scored, systems: Systems, n_resamples: int, rng_seed: int
) -> dict[str, Any]:
    """The entry `labels` of metrics.json: purity and NMI, and a row for each of the most frequent labels."""
    crossed = labels.Crossed(int(reported.cluster_D.max()) + 1)
    crossed.add(labelled.label_D.tolist(), reported.cluster_D)
    counts = Counter(labelled.label_D.tolist())
    rows = []
    for name in labels.most_frequent(counts)[: labels.SHOWN]:
        rows_D = np.flatnonzero(labelled.label_D == name)
        of_label = Systems(systems.ensemble[rows_D], {d: nll_D[rows_D] for d, nll_D in systems.dense.items()})
        found = _perplexities(reported.n_tokens_D[rows_D], of_label, n_resamples, rng_seed)
        rows.append({"label": name, "n_documents": counts[name], **found})
    about = {"field": labelled.field, "n_labels": len(set(counts) - {""})}
    return {**about, "training": labelled.training, "held_out": crossed.agreement(), "rows": rows}


def _perplexities(
    n_tokens_D: np.ndarray, systems: Systems, n_resamples: int, rng_seed: int
) -> dict[str, Any]:
    """Perplexities on some documents, and the ratio of the ensemble to each dense model.

    The ratio has a 95 % interval where resampling the documents says something.
    """
    n_tokens, nll_D1 = int(n_tokens_D.sum()), systems.ensemble[:, None]
    ratios = {
        name: bootstrap.estimates(nll_D1, dense_D, n_tokens_D, n_resamples, rng_seed)[0]
        for name, dense_D in systems.dense.items()
    }
    everyone = {"ensemble": systems.ensemble, **systems.dense}
    perplexity = {name: math.exp(float(nll_D.sum()) / n_tokens) for name, nll_D in everyone.items()}
    return {"n_tokens": n_tokens, "perplexity": perplexity, "ratios": ratios}
