"""Opening modules, finding layers, moving about: by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pages import box, facts, page_of, search, strip, trail, trained_net
from playwright.sync_api import Page, expect

Open = Callable[..., Page]
BLOCKS = "blocks.0 … 2"


@pytest.fixture
def closed(open_page: Open) -> Page:
    """The page of a small model with its blocks closed."""
    return open_page(page_of(trained_net(), depth=0))


def selected(page: Page) -> str:
    label = page.locator("#scroller [aria-selected=true]").get_attribute("aria-label")
    return (label or "").split(",")[0]


@pytest.mark.parametrize("clicks", [1, 2])
def test_a_click_shows_the_inside_of_a_module_and_the_trail_leads_back(closed: Page, clicks: int) -> None:
    assert closed.locator("#scroller .strip").count() == 0
    box(closed, BLOCKS).click(click_count=clicks)
    assert trail(closed) == ["Net", BLOCKS]
    assert closed.locator("#panel h2").inner_text() == f"{BLOCKS} × 3"
    assert strip(closed, "up").startswith("r 4 · d 12 · mean ")
    assert box(closed, "up").locator(".cell").count() == 3, "a cell for each of the three blocks"
    closed.locator("#trail").get_by_text("Net").click()
    assert trail(closed) == []
    expect(box(closed, "stem")).to_be_in_viewport()


def test_a_search_knows_classes_and_expressions(closed: Page) -> None:
    assert search(closed, "layernorm") == [f"blocks.{index}.norm" for index in range(3)]
    assert search(closed, "no such layer") == []
    assert closed.locator("#found").inner_text() == "nothing found"
    assert not closed.locator("#hits").is_visible()
    assert search(closed, "(up") == []
    assert search(closed, "up$") == [f"blocks.{index}.up" for index in range(3)]
    closed.locator("#hits li").last.click()
    assert selected(closed) == "up"
    assert not closed.locator("#hits").is_visible()
    expect(box(closed, "up")).to_be_in_viewport()


def test_the_keyboard_does_it_all(closed: Page) -> None:
    press = closed.keyboard.press
    press("ArrowDown")
    assert selected(closed) == "x"
    press("ArrowDown")
    press("ArrowDown")
    assert selected(closed) == BLOCKS
    press("Enter")
    assert trail(closed) == ["Net", BLOCKS]
    for wanted in (BLOCKS, "norm", "up"):
        press("ArrowDown")
        assert selected(closed) == wanted
    assert closed.locator("#panel").is_visible()
    press("Backspace")
    assert (trail(closed), selected(closed)) == ([], BLOCKS)
    press("Escape")
    assert not closed.locator("#panel").is_visible()
    press("/")
    expect(closed.locator("#query")).to_be_focused()


def test_skipped_and_trained_layers_are_marked_listed_and_explained(closed: Page, open_page: Open) -> None:
    assert closed.locator("#scroller circle.skipped").count() == 2
    assert closed.locator("#skipped").inner_text() == "2 layers not adapted"
    closed.click("#skipped")
    assert closed.locator("#panel .not-adapted li").all_inner_texts() == ["stem", "head"]
    closed.locator("#panel").get_by_text("head").click()
    assert selected(closed) == "head"
    assert "not in target_modules" in closed.locator("#panel .reason").inner_text()
    assert facts(closed)["class"] == "Linear 12→4"
    page = open_page(page_of(trained_net(modules_to_save=["head"])))
    assert page.locator("#skipped").inner_text() == "1 layer not adapted"
    assert page.locator("#scroller g.trained").count() == 1
    box(page, "head").click()
    assert page.locator("#panel h3").all_inner_texts() == ["Trained in full"]
