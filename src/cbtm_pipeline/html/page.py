"""One self-contained HTML page: elements that escape what they hold, tables, and the style of the report."""

import html
from collections.abc import Iterable, Sequence

VOID = {"meta"}

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1d2530; --muted: #5d6876; --rule: #e1e4e8;
  --c0: #2c6cb0; --c1: #c4621a; --c2: #2d8a6b; --c3: #8b4fa3; --c4: #b03a52; --c5: #7a6a1f; --grey: #838c97;
  --good: 44 108 176; --bad: 196 98 26;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181e; --card: #1b2028; --ink: #e4e8ed; --muted: #9aa5b2; --rule: #2e3641;
    --c0: #6faeee; --c1: #f0a05e; --c2: #5fc7a2; --c3: #c596dd; --c4: #f0869b; --c5: #cdb95c; --grey: #88929e;
    --good: 58 122 190; --bad: 190 108 44;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
.note { color: var(--muted); font-size: .875rem; }
.lead { display: grid; grid-template-columns: 3fr 2fr; gap: 2rem; align-items: start; }
.lead > * { min-width: 0; }
.lead ul { padding-left: 1.2rem; color: var(--muted); font-size: .92rem; }
.claim { font-size: 1.5rem; line-height: 1.35; letter-spacing: -.01em; margin: 0 0 1rem; }
.claim strong { color: var(--c0); }
.controls { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem 1.1rem; }
.controls table { width: 100%; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 1rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr > :last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: .82rem; vertical-align: bottom; }
tbody th { white-space: nowrap; font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
tr.headline > * { font-weight: 650; }
.n { text-align: right; white-space: nowrap; }
thead .n { white-space: normal; }
table.heat :is(th, td) { border: 2px solid var(--paper); padding: .35rem .7rem; }
table.heat th:first-child { padding-left: 0; }
table.heat :is(td, thead th) { text-align: right; }
.terms { min-width: 16rem; }
.sizes { min-width: 7rem; }
.sizes svg { height: .8rem; margin-top: .35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem; margin: 1.2rem 0; }
figure { margin: 0; max-width: 38rem; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg text.name { fill: var(--ink); }
.grid, .one { stroke: var(--rule); fill: none; }
.one { stroke: var(--muted); }
.line { stroke: var(--c); fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1; opacity: .65; }
.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.dot { fill: var(--c); stroke: var(--paper); }
.bar { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .3rem 0 0; padding: 0; font-size: .85rem; }
.legend li { stroke: none; opacity: 1; }
.legend li::before {
  content: ""; display: inline-block; width: 1.4em; margin-right: .45em; vertical-align: .28em; border-top: 2.5px solid var(--c);
}
.legend li.dashed::before { border-top: 2px dashed var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .grey { --c: var(--grey); }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--muted); }
@media (max-width: 46rem) {
  main { padding: 1.25rem 1rem 3rem; }
  .lead { grid-template-columns: 1fr; gap: 1rem; }
  .claim { font-size: 1.3rem; }
}
"""


class Html(str):
    """Text that is markup already; any other text is escaped."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes that are None are left out; `class_` and `aria_label` become `class` and `aria-label`."""
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    said = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"'
        for k, v in attributes.items()
        if v is not None
    )
    return Html(f"<{name}{said}>" if name in VOID else f"<{name}{said}>{inside}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


class Number(str):
    """A cell that is aligned to the right."""


def count(value: float) -> Number:
    """`1 234 567`, with narrow spaces."""
    return Number(f"{value:,.0f}".replace(",", "\u202f"))


def flops(value: float) -> Number:
    """`3.93·10¹³`"""
    if not value:
        return Number("0")
    mantissa, exponent = f"{value:.2e}".split("e")
    return Number(f"{mantissa}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}")


def decimals(value: float | None, n: int = 2) -> Number:
    """`27.85`, or a dash where there is no number."""
    return Number("–" if value is None else f"{value:,.{n}f}".replace(",", "\u202f"))


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    class_: str | None = None,
    marked: Iterable[int] = (),
) -> Html:
    """A table that scrolls sideways where the screen is narrow. The first cell of a row is its header; rows `marked` stand out."""
    rows, marked = list(rows), set(marked)
    right = {i for row in rows for i, cell in enumerate(row) if isinstance(cell, Number)}
    head = [tag("th", cell, scope="col", class_="n" if i in right else None) for i, cell in enumerate(header)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(
                cell if str(cell).startswith("<td") else tag("td", cell, class_="n" if i in right else None)
                for i, cell in enumerate(row[1:], 1)
            ),
            class_="headline" if r in marked else None,
        )
        for r, row in enumerate(rows)
    ]
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_=class_),
        class_="scroll",
    )


def page(title: str, *sections: Html) -> str:
    """The whole document."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    body = join(part for section in sections for part in (section, "\n"))
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', tag('main', body)), lang='en')}\n"
