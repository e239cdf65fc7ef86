"""A headless Chromium, and pages in it that must not request, log or raise anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import find_browser
from playwright.sync_api import Browser, Page, sync_playwright

# The tests need a browser. If there is none, the end of the test run says so (see tests/conftest.py).
collect_ignore_glob = [] if find_browser() else ["test_*.py"]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for each test file, because the event loop of playwright disturbs other tests."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a page from its text. The test fails if a page logs a message, raises an error or sends a request."""
    heard: list[str] = []
    contexts = []

    def open_text(text: str, *, address: str = "", **options: Any) -> Page:
        file = tmp_path / f"page{len(contexts)}.html"
        file.write_text(text, encoding="utf-8", newline="\n")
        context = browser.new_context(**({"viewport": {"width": 1300, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: heard.append(request.url) if request.url.partition("#")[0] != file.as_uri() else None,
        )
        page.goto(file.as_uri() + address)
        return page

    yield open_text
    for context in contexts:
        context.close()
    assert heard == []
