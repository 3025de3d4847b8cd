"""An HTML parser for tests of the report."""

from html.parser import HTMLParser

from cbtm_pipeline.html import page


class Page(HTMLParser):
    """Collects what a reader sees. Fails on elements that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in page.VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "h2" in self.open:
            self.headings[-1] += data
        if {"th", "td"} & set(self.open):
            self.cells[-1] += data
