"""A self-contained HTML page: elements that escape their content, tables, numbers, and the document."""

import html
from collections.abc import Iterable, Sequence
from importlib import resources

VOID = {"meta"}  # elements without an end tag


class Html(str):
    """Text that is markup already. All other text is escaped."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes that are None are left out.

    `class_` and `aria_label` become `class` and `aria-label`.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{pairs}>"
    return Html(start if name in VOID else f"{start}{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def section(title: str, note: str, *content: object) -> Html:
    """A section with its heading and a note in small letters."""
    return tag("section", tag("h2", title), tag("p", note, class_="note"), *content)


class Number(str):
    """A table cell that is aligned to the right."""


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
    """`27.85`, or a dash for None."""
    return Number("–" if value is None else f"{value:,.{n}f}".replace(",", "\u202f"))


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    class_: str | None = None,
    marked: Iterable[int] = (),
    label: str = "Table",
) -> Html:
    """A table that scrolls sideways on narrow screens, also by keyboard. `label` names it to screen readers.

    The first cell of a row is its header. A cell that is a `td` element already stays as it is. A column that
    holds a Number is aligned to the right. The rows with the indices `marked` stand out.
    """
    rows, marked = list(rows), set(marked)
    right = {i for row in rows for i, cell in enumerate(row) if isinstance(cell, Number)}

    def cell(i: int, content: object) -> object:
        return content if str(content).startswith("<td") else tag("td", content, class_=align(i))

    def align(i: int) -> str | None:
        return "n" if i in right else None

    head = [tag("th", content, scope="col", class_=align(i)) for i, content in enumerate(header)]
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            *(cell(i, content) for i, content in enumerate(others, 1)),
            class_="headline" if r in marked else None,
        )
        for r, (first, *others) in enumerate(rows)
    ]
    whole = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def page(title: str, *sections: Html) -> str:
    """The whole document, with its style sheet inside."""
    style = resources.files("cbtm_pipeline.html").joinpath("report.css").read_text("utf-8")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(f"\n{style}")),
    ]
    body = join(part for section in sections for part in (section, "\n"))
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', tag('main', body)), lang='en')}\n"
