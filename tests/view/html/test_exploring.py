"""Opening modules, finding layers and selecting boxes, by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pages import box, facts, page_of, search, strip, trained_net, unfolded
from playwright.sync_api import Page, expect

from hra_fx.view.drawing import drawing_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options

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
def test_a_click_opens_a_module_in_place_and_its_mark_closes_it(closed: Page, clicks: int) -> None:
    assert closed.locator("#scroller .strip").count() == 0
    box(closed, BLOCKS).click(click_count=clicks)
    assert unfolded(closed) == [BLOCKS]
    assert closed.locator("#panel h2").inner_text() == f"{BLOCKS} × 3"
    assert strip(closed, "up").startswith("r 4 · d 12 · mean ")
    assert box(closed, "up").locator(".cell").count() == 3, "a cell for each of the three blocks"
    expect(box(closed, "stem")).to_be_in_viewport()
    box(closed, "up").click()
    box(closed, BLOCKS).locator(":scope > .twist").click()
    assert (unfolded(closed), selected(closed)) == ([], BLOCKS)
    expect(box(closed, "up")).to_have_count(0)


def test_search_by_name_class_and_regular_expression(closed: Page) -> None:
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


def test_keyboard(closed: Page) -> None:
    press = closed.keyboard.press
    press("ArrowDown")
    assert selected(closed) == "x"
    press("ArrowDown")
    press("ArrowDown")
    assert selected(closed) == BLOCKS
    press("Enter")
    assert (unfolded(closed), selected(closed)) == ([BLOCKS], BLOCKS)
    press("Enter")
    assert unfolded(closed) == []
    press("Enter")
    for wanted in ("norm", "up"):
        press("ArrowDown")
        assert selected(closed) == wanted
    assert closed.locator("#panel").is_visible()
    press("Backspace")
    assert (unfolded(closed), selected(closed)) == ([], BLOCKS)
    press("Escape")
    assert not closed.locator("#panel").is_visible()
    press("/")
    expect(closed.locator("#query")).to_be_focused()


def test_an_address_names_open_modules_and_a_layer_and_back_works(closed: Page, open_page: Open) -> None:
    box(closed, BLOCKS).click()
    assert closed.url.endswith("#blocks.0")
    box(closed, "down").locator(".cell").nth(2).click()
    assert closed.url.endswith("#blocks.0,blocks.2.down")
    closed.go_back()
    expect(box(closed, "down")).to_have_count(0)
    assert selected(closed) == BLOCKS
    closed.go_forward()
    expect(box(closed, "down")).to_be_visible()
    assert closed.locator("#panel h3.instance").inner_text() == "blocks.2.down"
    for address, chosen in (("#blocks.1.down", "down"), ("#blocks.0", BLOCKS), ("#nowhere", ""), ("#%", "")):
        page = open_page(page_of(trained_net(), depth=0), address=address)
        assert unfolded(page) == ([BLOCKS] if chosen else [])
        assert page.locator("#scroller [aria-selected=true]").count() == bool(chosen)
        if chosen:
            assert selected(page) == chosen
    page = open_page(page_of(trained_net(), depth=0), address="#blocks.1.down")
    assert page.locator("#panel h3.instance").inner_text() == "blocks.1.down"


def test_shapes_of_values_are_shown_and_hidden(open_page: Open) -> None:
    page = open_page(render(drawing_of(trained_net(), torch.randn(5, 6)), Options()))
    shapes = page.locator("#scroller .shape")
    assert shapes.all_text_contents() == ["5×6", "5×12", "5×12", "5×4", *["5×12", "5×24", "5×24", "5×12"]]
    page.keyboard.press("s")
    expect(shapes.first).to_be_hidden()
    assert page.locator("#shapes").get_attribute("aria-pressed") == "false"
    assert not open_page(page_of(trained_net())).locator("#shapes").is_visible(), "no shapes are known"


def test_a_phone_shows_the_whole_legend(open_page: Open) -> None:
    page = open_page(page_of(trained_net()), viewport={"width": 390, "height": 800}, is_mobile=True, has_touch=True)
    for entry in page.locator("#legend li").all():
        expect(entry).to_be_in_viewport(ratio=1)
    assert page.locator("#legend li").count() == 4


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
