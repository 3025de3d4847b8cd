"""Say which experts a text gets, with which weights, and why.

    cbtm route "Preheat the oven, then whisk the butter."
    cbtm route FILE --html page.html

The terms come from the embedding: each takes some off the squared distance between the text and a centre.
With the router `filter`, the weights also depend on how well each expert has predicted the text so far. With
--html, a page shows each token in the colour of its most weighted expert. It is also
`python -m cbtm_pipeline.route_text`.

Shapes: N tokens of the text, K experts. Row N of the weights is for the token after the text.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.base.printable import printable as as_printable
from cbtm_pipeline.html.page import Html, decimals, join, page, section, table, tag
from cbtm_pipeline.inference import where
from cbtm_pipeline.inference.mixture import Mixture

N_TERMS = 10  # that are shown
N_OWN_TERMS = 6  # of an expert, to say what it is


class Routed(NamedTuple):
    """A text with the weights of the experts. `pieces`: what each token adds to the text."""

    pieces: list[str]
    w_NK: np.ndarray  # N + 1 rows
    d2_K: np.ndarray  # of the whole text
    deciding: list[tuple[str, int, float, float]]  # term, count, what it takes off both distances

    @property
    def order(self) -> list[int]:
        """The experts, the one with the largest weight after the text first."""
        return np.argsort(-self.w_NK[-1], kind="stable").tolist()


def text_of(argument: str) -> str:
    """The content of a file of this name, else the argument itself."""
    try:
        is_file = Path(argument).is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        is_file = False
    if argument == "-":
        return sys.stdin.read()
    if is_file:
        return Path(argument).read_bytes().decode("utf-8", "replace")
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def route(mixture: Mixture, text: str) -> Routed:
    """Route a text. Raises ValueError if it has no token."""
    from tokenizers import Tokenizer

    from cbtm_pipeline.corpus.encoding import TokenEncoder
    from cbtm_pipeline.inference import mixture as mixtures
    from cbtm_pipeline.inference.decoding import Decoder
    from cbtm_pipeline.mixture.routers import HeldOut
    from cbtm_pipeline.score import Windows, distances, score

    path = mixture.folder / "tokenizer.json"
    ids_N = TokenEncoder(path).encode(text.encode(), fast=False).astype(np.int64)
    if not len(ids_N):
        raise ValueError("TEXT: empty. Expected a text, or the name of a file with one. Give one.")
    # the separator at the end stands for the token after the text, which no weight depends on
    document = np.concatenate([[mixture.separator_id], ids_N, [mixture.separator_id]])
    d2_NK = distances(mixture, [document])
    logprob_NK = np.zeros(d2_NK.shape, np.float32)
    if mixture.needs_experts:
        windows = Windows(mixture.context, max(1, mixture.context // 2))
        folders = (mixture.folder / "experts" / name for name in mixture.names)
        logprob_NK = np.stack([score(folder, [document], windows) for folder in folders], axis=1)
    held_out = HeldOut(logprob_NK, d2_NK, np.array([0, len(d2_NK)]))
    w_NK = np.exp(mixtures.log_weights(mixture, held_out))
    first, other, *_ = [*np.argsort(d2_NK[-1], kind="stable").tolist(), 0]
    decoder = Decoder(_Plain(Tokenizer.from_file(str(path))))
    pieces = [decoder.add(token) for token in ids_N.tolist()]
    pieces[-1] += decoder.end()
    deciding = [
        (decoder.tokenizer.decode([term]), n, own, others)
        for term, n, own, others in mixtures.terms_that_decide(mixture, ids_N, first, other)
    ]
    return Routed(pieces, w_NK, d2_NK[-1], deciding)


class _Plain:
    """A tokenizer as `Decoder` calls it."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def experts(mixture: Mixture, routed: Routed) -> list[tuple[str, float, float, float, str]]:
    """Of each expert: name, weight after the text, mean weight over its tokens, d2, and its terms."""
    mean_K = routed.w_NK[:-1].mean(axis=0)
    return [
        (
            mixture.names[j],
            float(routed.w_NK[-1, j]),
            float(mean_K[j]),
            float(routed.d2_K[j]),
            " ".join(term.strip() for term in mixture.terms[j][:N_OWN_TERMS]),
        )
        for j in routed.order
    ]


def settings(mixture: Mixture) -> str:
    """The mixture in words."""
    values = mixture.setting._asdict()
    shown = (f"{key} {values[key]:g}" for key in values if key != "router" and values[key] is not None)
    return f"router {values['router']}, {', '.join(shown)}"


def nearest_two(mixture: Mixture, routed: Routed) -> tuple[str, str | None]:
    """The experts whose centres are nearest to the text."""
    order = np.argsort(routed.d2_K, kind="stable").tolist()
    return mixture.names[order[0]], mixture.names[order[1]] if len(order) > 1 else None


def lines(mixture: Mixture, routed: Routed) -> list[str]:
    """The answer as plain text."""
    found = [f"{len(routed.pieces)} tokens, {settings(mixture)}", ""]
    width = max(6, *map(len, mixture.names))
    found.append(f"{'expert':{width}}  weight now  mean weight  distance  what sets it apart")
    for name, now, mean, d2, terms in experts(mixture, routed):
        numbers = f"{100 * now:8.1f} %  {100 * mean:9.1f} %  {d2:8.4f}"
        found.append(f"{name:{width}}  {numbers}  {as_printable(terms, keep='')}".rstrip())
    first, other = nearest_two(mixture, routed)
    if not routed.deciding:
        return [*found, "", "No term of this text has a vector: it is equally far from all centres."]
    found += ["", f"Terms, and what each takes off the distance to expert {first}"]
    found[-1] += f" and to the next, expert {other}:" if other else ":"
    for term, n, own, others in routed.deciding[:N_TERMS]:
        shown = as_printable(repr(term), keep="")
        beside = f"  {others:+.4f}" if other else ""
        found.append(f"  {own:+.4f}{beside}  {shown}{f' x {n}' if n > 1 else ''}")
    return found


def html(mixture: Mixture, routed: Routed) -> str:
    """The answer as a page: the text in colours, the weights, the terms."""
    colours = [f"hsl({round(360 * j / len(mixture.names))} 70% 50% / 0.3)" for j in range(len(mixture.names))]
    spans = []
    for piece, w_K in zip(routed.pieces, routed.w_NK, strict=False):
        order = [j for j in np.argsort(-w_K, kind="stable").tolist() if w_K[j] > 0]
        title = ", ".join(f"expert {mixture.names[j]}: {100 * w_K[j]:.0f} %" for j in order)
        style = f"background: {colours[order[0]]}"
        spans.append(tag("span", as_printable(piece), title=title, style=style))
    rows = [
        [
            tag("span", f"expert {name}", style=f"background: {colours[mixture.names.index(name)]}"),
            decimals(100 * now, 1),
            decimals(100 * mean, 1),
            decimals(d2, 4),
            tag("td", as_printable(terms, keep=""), class_="terms"),
        ]
        for name, now, mean, d2, terms in experts(mixture, routed)
    ]
    header = ["", "weight after the text, %", "mean weight, %", "squared distance", "what sets it apart"]
    first, other = nearest_two(mixture, routed)
    title = "Which experts a text gets"
    note = "Each token in the colour of the expert that weighed most when it was predicted. Point at one."
    return page(
        title,
        join([tag("h1", title)]),
        section("The text", note, tag("p", *spans, style="white-space: pre-wrap; max-width: none")),
        section("Experts", f"{settings(mixture)}.", table(header, rows)),
        _terms(routed, first, other),
    )


def _terms(routed: Routed, first: str, other: str | None) -> Html:
    rows = [
        [
            tag("code", as_printable(repr(term), keep="")),
            *map(decimals, (own, others), (4, 4)),
            decimals(n, 0),
        ]
        for term, n, own, others in routed.deciding[:N_TERMS]
    ]
    note = "What each term takes off the squared distance to a centre. The first speak most for the nearest."
    header = ["term", f"expert {first}", f"expert {other}" if other else "the same", "times"]
    return section("Terms", note, table(header, rows))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", metavar="TEXT|FILE", help="a text, the name of a text file, or - for stdin")
    where.add_options(p)
    where.add_exclude(p)
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page with the coloured text, too")
    args = p.parse_args()
    folder, text = where.named(args), text_of(args.text)

    from cbtm_pipeline.inference import mixture as mixtures

    mixture = mixtures.read(folder, **where.without(args))
    routed = route(mixture, text)
    assert math.isclose(routed.w_NK[-1].sum(), 1.0, rel_tol=1e-6)
    printable.show("\n".join(lines(mixture, routed)), end="\n")
    if args.html:
        with artifact.publish(args.html) as tmp:
            tmp.write_text(html(mixture, routed), "utf-8")


if __name__ == "__main__":
    cli.run(main)
