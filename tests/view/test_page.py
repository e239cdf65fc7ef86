"""The script of the page, in a browser: finding a layer, the panel, addresses and zooming."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser
from drawn_models import HOSTILE, draw, drawn
from playwright.sync_api import Browser, Page, expect, sync_playwright

import hra_fx

Open = Callable[..., Page]
QUERY = "encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a model. The test fails if the page logs a message, raises an error or sends a request."""
    heard: list[str] = []
    contexts = []

    def opened(name: str = "bert", address: str = "", depth: int | None = 0, **options: Any) -> Page:
        file = draw(name, tmp_path / "page.html", depth=depth)
        contexts.append(browser.new_context(**({"viewport": {"width": 1300, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url) if "page.html" not in request.url else None)
        page.goto(file.as_uri() + address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


def shows(page: Page, address: str | re.Pattern[str]) -> None:
    """Expect the address of the only picture or section that is visible."""
    expect(page.locator("main > :visible")).to_have_attribute("id", address)


def search(page: Page, words: str) -> list[str]:
    page.keyboard.press("/")
    page.locator("input").fill(words)
    return page.locator("search li a").evaluate_all("links => links.map((link) => link.firstChild.textContent)")


def test_a_layer_is_found_and_described(open_page: Open) -> None:
    page = open_page()
    shows(page, "/")
    assert search(page, "layer.1 query") == [QUERY]
    assert search(page, "layernorm attention") == [f"encoder.layer.{i}.attention.output.LayerNorm" for i in range(3)]
    assert search(page, "no such layer") == []
    search(page, "layer.1 query")
    page.keyboard.press("Enter")
    expect(page.locator(".selected > .frame")).to_be_in_viewport()
    expect(page.locator("aside h2")).to_have_text(QUERY)
    row = next(row for row in hra_fx.report(drawn("bert")) if row.path == QUERY)
    facts = page.locator("aside details[open] dd").all_inner_texts()
    assert {str(row.d), str(row.r), f"{100 * row.weight_change:.1f}%"} <= {*facts}
    assert page.url.endswith(f"#{QUERY}")
    page.keyboard.press("Escape")
    expect(page.locator("aside")).to_be_hidden()


def test_a_closed_module_leads_to_its_picture_and_the_way_back(open_page: Open) -> None:
    page = open_page()
    page.locator("main > .shown a.closed").first.click()
    shows(page, re.compile("^/(encoder.layer.0|embeddings)$"))
    page.locator("figure.shown figcaption a").last.click()
    shows(page, "/")
    page.go_back()
    shows(page, re.compile("/."))
    page.locator("nav a", has_text="Report").click()
    shows(page, "//report")
    page.locator("nav a", has_text="Picture").click()
    shows(page, "/")


def test_an_address_leads_to_a_layer_a_module_or_the_reasons(open_page: Open) -> None:
    page = open_page(address=f"#{QUERY}")
    assert page.locator("aside h2").inner_text() == QUERY
    expect(page.locator(".selected > .frame")).to_be_in_viewport()
    shows(open_page(address="#/encoder.layer.0"), "/encoder.layer.0")
    shows(open_page("resnet", address="#//not-adapted", depth=1), re.compile("^/(/not-adapted)?$"))
    shows(open_page(address="#nowhere"), "/")


@pytest.mark.parametrize("name", ["hostile", "hostile, in Python"])
def test_hostile_names_are_found(open_page: Open, name: str) -> None:
    page = open_page(name, depth=None)
    for path in HOSTILE:
        found = search(page, path)
        (hit,) = [hit for hit in found if hit.removeprefix("part.") == path]
        page.locator("search li a").nth(found.index(hit)).click()
        expect(page.locator("aside h2")).to_have_text(hit)
        page.reload()
        expect(page.locator("aside h2")).to_have_text(hit)  # the address leads to it


def test_zooming_and_a_phone(open_page: Open) -> None:
    page = open_page(depth=None)
    level = page.locator(".zoom button").nth(1)
    wide = page.locator("figure.shown > svg").bounding_box()["width"]  # type: ignore[index]
    before = int(level.inner_text().rstrip("%"))
    page.keyboard.press("+")
    assert int(level.inner_text().rstrip("%")) == pytest.approx(1.2 * before, abs=1)
    assert page.locator("figure.shown > svg").bounding_box()["width"] == pytest.approx(1.2 * wide, rel=0.02)  # type: ignore[index]
    page.locator(".zoom button").first.click()
    assert int(level.inner_text().rstrip("%")) == pytest.approx(before, abs=1)
    phone = open_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    colors = phone.evaluate(
        "[getComputedStyle(document.body), getComputedStyle(document.querySelector('.frame'))]"
        ".map((style) => style.backgroundColor + style.fill)"
    )
    assert "rgb(18, 22, 29)" in colors[0] and "rgb(255, 255, 255)" not in colors[1]
