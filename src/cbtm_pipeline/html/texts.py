"""Texts whose tokens have the colour of their expert, for the report."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from cbtm_pipeline.base.printable import printable
from cbtm_pipeline.html.page import Html, section, tag

N_COLOURS = 6  # classes c0 ... c5 of report.css; then again


class Text(NamedTuple):
    """A document: the text that each token adds, and the expert of largest weight there."""

    doc_id: str
    n_switches: int
    pieces: Sequence[str]
    experts: Sequence[int]


def coloured(text: Text) -> Html:
    """A paragraph. Each run of one expert has its colour, begins with its number, and says so on hovering."""
    parts, runs = [], itertools.groupby(zip(text.experts, text.pieces, strict=True), key=lambda pair: pair[0])
    for expert, run in runs:
        shown = printable("".join(piece for _, piece in run))
        parts.append(
            tag("span", tag("sup", expert), shown, class_=f"c{expert % N_COLOURS}", title=f"expert {expert}")
        )
    return tag("p", *parts, class_="coloured")


def texts_section(texts: Sequence[Text], names: Sequence[str]) -> Html:
    """The texts with a legend of the experts, by number."""
    items = [tag("li", f"{j}: expert {name}", class_=f"c{j % N_COLOURS}") for j, name in enumerate(names)]
    note = (
        "Held-out documents with the most, a middle number of, and the fewest switches. "
        "Colour and small number: the expert of largest weight when the token was predicted."
    )
    shown = [
        part
        for text in texts
        for part in (
            tag("h3", printable(f"{text.doc_id}: {text.n_switches} switches", keep="")),
            coloured(text),
        )
    ]
    return section("Texts and their experts", note, tag("ul", *items, class_="legend"), *shown)
