"""Section of the report on labels: perplexity by label, and what labels the clusters have."""

from collections.abc import Mapping
from typing import Any

from cbtm_pipeline.base.printable import printable, shortened
from cbtm_pipeline.corpus.labels import NONE
from cbtm_pipeline.html.page import Html, Number, count, decimals, section, table, tag
from cbtm_pipeline.mixture import verdict

_SHOWN = 60  # characters of a label
_COLUMNS = 12  # labels that the table of clusters has columns for


def by_label(metrics: Mapping[str, Any], assignments: Mapping[str, Any]) -> Html:
    """The section. metrics.json has the entry `labels`, the manifest of the assignments too."""
    found = metrics["labels"]
    training, held_out = found["training"], found["held_out"]
    note = (
        f"Labels are the field {_name(found['field'])} of the rows: {training['n_labels']} in the training "
        "documents. No router sees them. Against these labels, the clusters have "
        f"{_agreement(training)} on training documents and {_agreement(held_out)} on reported ones. Purity: "
        "the share of documents with the most frequent label of their cluster. NMI: mutual information over "
        "the mean entropy; 1 if clusters are labels."
    )
    return section("Labels", note, _perplexities(dict(metrics)), *_clusters(assignments["labels"]))


def _agreement(found: Mapping[str, Any]) -> str:
    if found["nmi"] is None:
        return "no documents with a label"
    return f"purity {found['purity']:.3f} and NMI {found['nmi']:.3f}"


def _name(label: str) -> str:
    return printable(shortened(label, _SHOWN), keep="") or NONE


def _perplexities(metrics: dict[str, Any]) -> Html:
    """A row for each label: perplexity of the best mixture and of the dense models, and their ratio."""
    strongest, shown = verdict.strongest_dense(metrics), metrics["labels"]["rows"]
    names = ["ensemble", *shown[0]["ratios"]] if shown else []
    rows = [
        [
            _name(row["label"]),
            count(row["n_documents"]),
            count(row["n_tokens"]),
            *(decimals(row["perplexity"][name]) for name in names),
            Number(verdict.interval(**row["ratios"][strongest])),
        ]
        for row in shown
    ]
    header = ["label", "reported documents", "tokens", *names, f"ratio to {strongest}"]
    about = (
        f"Perplexity of {verdict.label(verdict.headline(metrics))} and of the dense models on the reported "
        f"documents of each label, the {len(shown)} most frequent first."
    )
    whole = table(header, rows, label="Perplexity by label")
    return tag("div", tag("h3", "Perplexity by label"), tag("p", about, class_="note"), whole)


def _clusters(found: Mapping[str, Any]) -> list[Html]:
    """Training documents of each cluster by label: shares of the cluster."""
    names, shown = found["names"], found["names"][:_COLUMNS]
    rows = []
    for j, counts in enumerate(found["n_documents"]):
        total = sum(counts) or 1
        shares = [Number(f"{100 * n / total:.0f} %" if n else "") for n in counts[: len(shown)]]
        rest = sum(counts[len(shown) :])
        more = [Number(f"{100 * rest / total:.0f} %" if rest else "")] if len(names) > len(shown) else []
        rows.append([str(j), *shares, *more])
    header = ["cluster", *map(_name, shown), *(["other"] if len(names) > len(shown) else [])]
    about = "Share of each label in the training documents of a cluster, the most frequent labels first."
    whole = table(header, rows, label="Labels of the clusters")
    return [tag("h3", "Labels of the clusters"), tag("p", about, class_="note"), whole]
