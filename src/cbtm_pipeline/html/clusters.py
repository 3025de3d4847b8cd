"""Section of the report on the clusters: size, what sets them apart, and documents of each."""

from collections.abc import Mapping, Sequence
from typing import Any

from cbtm_pipeline.base.printable import printable
from cbtm_pipeline.html import charts
from cbtm_pipeline.html.page import Html, Number, count, section, table, tag

Example = tuple[str, str]  # id and beginning of a document


def clusters(
    assignments: Mapping[str, Any],
    reported: Sequence[int],
    top_terms: Sequence[Sequence[str]],
    examples: Sequence[Sequence[Example]],
) -> Html:
    """The section. `assignments` is the manifest; `reported` are numbers of documents, by cluster."""
    n_documents, n_tokens = assignments["n_documents"], assignments["n_tokens"]
    total, largest = sum(n_tokens), max(n_tokens)
    rows = [
        [
            str(j),
            count(n_documents[j]),
            count(n_tokens[j]),
            _bar(n_tokens[j] / largest, n_tokens[j] / total),
            Number(f"{100 * n_tokens[j] / total:.1f} %"),
            count(reported[j]),
            tag("td", ", ".join(term.strip() for term in terms), class_="terms"),
        ]
        for j, terms in enumerate(top_terms)
    ]
    header = ["cluster", "documents", "tokens", "size", "share", "reported documents", "what sets it apart"]
    note = (
        f"Training documents, {_made(assignments)}. {_borrowed(assignments)}"
        f"Largest cluster over the mean: {largest * len(n_tokens) / total:.3f} in tokens."
    )
    return section("Clusters", note, table(header, rows, label="Clusters"), *_examples(examples))


def _made(assignments: Mapping[str, Any]) -> str:
    """How the clusters were made."""
    by, balanced = assignments.get("by"), f"balanced by {assignments['balance']}"
    return "grouped by their labels" if by == "label" else f"{balanced}, by {by}" if by else balanced


def _borrowed(assignments: Mapping[str, Any]) -> str:
    """What experts read of other clusters, with soft borders."""
    if "border" not in assignments:
        return ""
    n, own = sum(assignments["border"]["n_tokens"]), sum(assignments["n_tokens"])
    return f"Besides, {n / (n + own):.1%} of the experts' text are documents that other clusters lend. "


def _bar(share_of_largest: float, share: float) -> Html:
    drawn = charts.bar(share_of_largest, f"{share:.1%} of the tokens")
    return tag("td", drawn, class_="sizes")


def _examples(examples: Sequence[Sequence[Example]]) -> list[Html]:
    """Some reported documents of each cluster."""
    if not any(examples):
        return []
    shown = []
    for j, found in enumerate(examples):
        items = [
            tag("li", tag("b", printable(doc_id, keep="")), " ", tag("span", printable(text, keep="")))
            for doc_id, text in found
        ]
        if items:
            shown += [tag("h4", f"Cluster {j}"), tag("ul", *items, class_="examples")]
    about = "Reported documents that lie nearest to the centre of their cluster, with their first words."
    return [tag("h3", "Documents of each cluster"), tag("p", about, class_="note"), *shown]
