"""The page of `cbtm serve` in a real browser: Debian's Chromium."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

import made_server
from made_project import TOPICS
from made_server import Server

pytestmark = pytest.mark.slow
KEY = "open-sesame"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("made")
    ensemble = made_server.write_ensemble(folder)
    with made_server.serving(ensemble, folder / "log", "--max-tokens", "4000") as server:
        yield server


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page that fails the test for an error in its console, and for a request to anywhere else."""
    page, faults = browser.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda r: None if "//127.0.0.1:" in r.url or "data:" in r.url else faults.append(r.url)
    )
    yield page
    page.close()
    assert [fault for fault in faults if "status of 40" not in fault] == []


def test_a_text_comes_token_by_token_in_the_colours_of_its_experts(server: Server, page: Page) -> None:
    page.goto(server.url)
    expect(page.locator("#experts li")).to_have_count(3)
    expect(page.locator("#experts")).to_contain_text("kitchen: butter, flour")
    page.fill("#prompt", "ship <b>anchor</b>")
    page.fill("#tokens", "60")
    page.fill("#temperature", "0")
    page.click("#go")
    done = re.compile(r"^60 tokens, [\d.]+ per second$")
    expect(page.locator("#status")).to_have_text(done, timeout=30_000)
    options: Any = {"max_tokens": 60, "temperature": 0, "extra_body": {"router_weights": True}}
    reply: Any = server.client().completions.create(model="ensemble", prompt="ship <b>anchor</b>", **options)
    choice = reply.choices[0]
    assert page.locator("#text").evaluate("e => e.textContent") == "ship <b>anchor</b>" + choice.text
    spans = page.locator("#text [data-expert]")
    assert spans.count() == 60
    first = [next(iter(token["weights"])) for token in choice.router_weights]
    assert spans.evaluate_all("all => all.map(e => e.dataset.expert)") == first
    colours = spans.evaluate_all(
        "all => all.map(e => [e.dataset.expert, getComputedStyle(e).backgroundColor])"
    )
    assert all(colour not in ("", "rgba(0, 0, 0, 0)") for _, colour in colours)
    assert len({name for name, _ in colours}) > 1, "more than one expert has spoken"
    swatch = "all => all.map(e => getComputedStyle(e, '::before').borderTopColor)"
    assert len(set(page.locator("#experts li").evaluate_all(swatch))) == 3
    assert re.fullmatch(r"(\w+: \d+ %\n?){2}", spans.first.get_attribute("title") or "")


def test_text_of_a_model_is_never_markup(server: Server, page: Page) -> None:
    page.goto(server.url)
    expect(page.locator("#experts li")).to_have_count(3)
    page.evaluate("show({token: '<b>bold</b>', weights: {kitchen: 1}})")
    assert page.locator("#text").evaluate("e => e.textContent") == "<b>bold</b>"
    assert page.locator("#text b").count() == 0


def test_stop_ends_the_text(server: Server, page: Page) -> None:
    page.goto(server.url)
    page.fill("#prompt", "rose")
    page.fill("#tokens", "4000")
    page.click("#go")
    expect(page.locator("#text [data-expert]").nth(5)).to_be_attached(timeout=30_000)
    page.click("#stop")
    expect(page.locator("#status")).to_have_text(re.compile(r"^stopped after \d+ tokens$"))
    expect(page.locator("#go")).to_be_enabled()


def test_a_refusal_is_shown(server: Server, page: Page) -> None:
    page.goto(server.url)
    page.fill("#tokens", "4001")
    page.click("#go")
    expect(page.locator("#status")).to_have_text("max_tokens: 4001. Expected at most 4000. Ask for fewer.")


def test_the_key_is_asked_for(tmp_path: Path, page: Page) -> None:
    ensemble = made_server.write_ensemble(tmp_path)
    with made_server.serving(ensemble, tmp_path / "log", key=KEY) as server:
        page.goto(server.url)
        expect(page.locator("#status")).to_contain_text("key: missing or wrong")
        page.fill("#key", KEY)
        page.fill("#prompt", TOPICS["garden"])
        page.fill("#tokens", "5")
        page.click("#go")
        expect(page.locator("#status")).to_contain_text("5 tokens", timeout=30_000)
