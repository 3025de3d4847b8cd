"""Show the clusters of a run: their size, what sets them apart, and how well their experts do.

    cbtm clusters
    cbtm clusters --model DIR

Where documents have labels (corpus.label_field), the most frequent ones of each cluster stand there, too.
With --model, there is a row for each expert of an ensemble that lies elsewhere or was changed; documents and
tokens are not known there. The validation loss (nats per token) is that of the expert on held-out documents
of its own cluster, at the end of its training. What is not made yet is left out. It is also
`python -m cbtm_pipeline.clusters`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.base.printable import printable as as_printable
from cbtm_pipeline.corpus import labels
from cbtm_pipeline.inference import changed_set, where
from cbtm_pipeline.ops import which_run
from cbtm_pipeline.provenance import records

N_TERMS = 8
HEADER = ("cluster", "documents", "tokens", "share", "validation loss", "what sets it apart")
LABELS = "labels"  # the column before the last, where documents have labels


def read(outdir: Path) -> list[dict[str, Any]]:
    """A row for each cluster. Raises ValueError if there are no clusters yet, or for a damaged file."""
    path, terms_path = records.clusters(outdir)
    if not path.exists():
        raise ValueError(f"{outdir}: no clusters yet. Expected {path}. Start the run, or name its outdir.")
    manifest = artifact.read_sealed(path, "assignments")
    terms = artifact.read_sealed(terms_path, "top_terms")
    artifact.check_made_from(terms_path, terms, "clusterer", manifest["made_from"]["clusterer"])
    total = sum(manifest["n_tokens"]) or 1
    rows = []
    for j, (n_documents, n_tokens) in enumerate(
        zip(manifest["n_documents"], manifest["n_tokens"], strict=True)
    ):
        card_path = outdir / f"experts/{j}/card.json"
        card = artifact.read_sealed(card_path, "expert") if card_path.exists() else {}
        is_its_own = card and card["made_from"]["tokens"] == manifest["identity_groups"][j]
        rows.append(
            {
                "cluster": j,
                "n_documents": n_documents,
                "n_tokens": n_tokens,
                "share": n_tokens / total,
                "validation_loss": card.get("validation_loss") if is_its_own else None,
                "top_terms": [term.strip() for term in terms["top_terms"][j]],
                **({"labels": _labels(manifest, j)} if "labels" in manifest else {}),
            }
        )
    return rows


def _labels(manifest: dict[str, Any], j: int) -> dict[str, float]:
    """The most frequent labels of cluster j, each with its share of the documents."""
    found = manifest["labels"]
    return labels.top(found["names"], found["n_documents"][j], manifest["n_documents"][j])


def read_model(folder: Path) -> list[dict[str, Any]]:
    """A row for each expert of an ensemble. Raises ValueError for a damaged file."""
    found = changed_set.read(folder)
    nothing = {"n_documents": None, "n_tokens": None, "share": None}
    rows = []
    for name, terms in zip(found.names, found.terms, strict=True):
        loss = changed_set.read_card(folder / "experts" / name).get("validation_loss")
        own = [term.strip() for term in terms]
        rows.append({"cluster": name, **nothing, "validation_loss": loss, "top_terms": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned plain text."""
    labelled = any("labels" in row for row in rows)
    header = [*HEADER[:-1], LABELS, HEADER[-1]] if labelled else HEADER
    cells = [
        (
            f"{row['cluster']}",
            "" if row["n_documents"] is None else f"{row['n_documents']:,}",
            "" if row["n_tokens"] is None else f"{row['n_tokens']:,}",
            "" if row["share"] is None else f"{100 * row['share']:.1f} %",
            "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}",
            *([as_printable(labels.shown(row.get("labels", {})), keep="")] if labelled else []),
            as_printable(" ".join(row["top_terms"][:N_TERMS]), keep=""),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for *numbers, terms in [header, *cells]:
        lines.append("  ".join([*map(str.rjust, numbers, widths), terms]).rstrip())
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where.add_options(p)
    p.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    args = p.parse_args()
    rows = read_model(where.named(args)) if args.model else read(which_run.named(args))
    printable.show(json.dumps(rows, indent=1, ensure_ascii=False) + "\n" if args.json else table(rows))


if __name__ == "__main__":
    cli.run(main)
