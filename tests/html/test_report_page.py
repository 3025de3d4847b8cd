"""The report in a real browser: on a phone, on a desk, by keyboard, and on paper."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from made_run import QUICK, evaluate, make, make_config, make_report_inputs, render

pytestmark = pytest.mark.slow
A4 = 688  # pixels between the margins of the page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with wide tables."""
    folder = tmp_path_factory.mktemp("made")
    files = make(
        folder, make_config(outdir=str(folder), cluster={"k": 8}, corpus={"label_field": "source"}, **QUICK)
    )
    arguments = make_report_inputs(files)
    evaluate(files)
    render([*arguments, "--demo"])
    return folder / "report.html"


def opened(browser: Any, report: Path, width: int, scheme: str = "light") -> Page:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.goto(report.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_axe_finds_nothing(browser: Any, report: Path, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python")
    page = opened(browser, report, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]] == []


@pytest.mark.parametrize("width", [375, 1200])
def test_nothing_is_wider_than_the_screen_and_tables_scroll_by_keyboard(
    browser: Any, report: Path, width: int
) -> None:
    page = opened(browser, report, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    table = page.get_by_role("region", name="Systems", exact=True)
    wider = table.evaluate("e => e.scrollWidth > e.clientWidth")
    assert wider or width > 375
    if wider:
        table.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("e => e.scrollLeft > 0", arg=table.element_handle())
        left = table.locator("tbody th").first.evaluate("e => e.getBoundingClientRect().left")
        assert left >= 0, "the first column stays in sight"


def test_on_paper_no_table_is_cut(browser: Any, report: Path, tmp_path: Path) -> None:
    page = opened(browser, report, A4, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    cut = page.locator(".scroll").evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert max(cut) <= 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().count(b"/Type /Page\n") <= 9
