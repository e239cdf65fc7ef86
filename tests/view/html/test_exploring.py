"""Opening and closing modules, finding layers, moving about: by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pages import box, boxes, facts, page_of, place, search, strip, trained_net
from playwright.sync_api import Page, expect

from hra_fx.model.state import adapted_layers

Open = Callable[..., Page]


@pytest.fixture
def closed(open_page: Open) -> Page:
    """The page of a small model with its blocks closed."""
    return open_page(page_of(trained_net(), depth=0))


def selected(page: Page) -> str:
    return page.locator(".adapted .selected").get_attribute("aria-label").split(",")[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("clicks", [1, 2])
def test_a_click_opens_a_module_and_shows_its_reflections(closed: Page, clicks: int) -> None:
    assert closed.locator(".strip").count() == 0
    box(closed, "blocks.0 … 2").click(click_count=clicks)
    expect(box(closed, "blocks.0 … 2")).to_have_attribute("aria-expanded", "true")
    assert closed.locator(".strip").count() == 2
    assert strip(closed, "up").startswith("r 4 · d 12 · mean ")
    assert box(closed, "up").locator(".cell").count() == 3, "a cell for each of the three blocks"


def test_modules_close_and_all_open_and_close(closed: Page) -> None:
    before = boxes(closed).count()
    box(closed, "blocks.0 … 2").click()
    closed.locator(".title").click()
    assert boxes(closed).count() == before
    assert box(closed, "blocks.0 … 2").get_attribute("aria-expanded") == "false"
    closed.click("#expand")
    assert closed.locator(".closed").count() == 0
    closed.click("#collapse")
    assert boxes(closed).count() == before


def test_what_is_opened_stays_under_the_pointer(open_page: Open) -> None:
    page = open_page(page_of(trained_net(), depth=0), viewport={"width": 700, "height": 420})
    box(page, "blocks.0 … 2").scroll_into_view_if_needed()
    before = place(page, "blocks.0 … 2")
    box(page, "blocks.0 … 2").click()
    after = place(page, "blocks.0 … 2")
    assert after["height"] > 3 * before["height"]
    assert after["y"] == pytest.approx(before["y"], abs=1)


def test_every_site_is_found_once_and_opened(closed: Page) -> None:
    closed.click("#regex")
    for path in adapted_layers(trained_net()):
        assert search(closed, f"^{path.replace('.', '[.]')}$") == [path]
        closed.keyboard.press("Enter")
        assert selected(closed) == path.rpartition(".")[2]
        assert closed.locator("#panel h3.instance").inner_text() == path


def test_a_search_knows_classes_and_expressions_and_tells_of_what_is_wrong(closed: Page) -> None:
    assert search(closed, "layernorm") == [f"blocks.{index}.norm" for index in range(3)]
    assert search(closed, "no such layer") == []
    assert closed.locator("#found").inner_text() == "nothing found"
    assert not closed.locator("#hits").is_visible()
    closed.click("#regex")
    assert search(closed, "(up") == []
    assert "Unterminated group" in closed.locator("#found").inner_text()
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
    assert selected(closed) == "blocks.0 … 2"
    press("Enter")
    assert box(closed, "blocks.0 … 2").get_attribute("aria-expanded") == "true"
    press("ArrowDown")
    press("ArrowDown")
    assert selected(closed) == "up"
    assert closed.locator("#panel").is_visible()
    press("ArrowUp")
    press("ArrowUp")
    press("Enter")
    assert box(closed, "blocks.0 … 2").get_attribute("aria-expanded") == "false"
    press("Escape")
    assert not closed.locator("#panel").is_visible()


def test_keys_of_the_page(closed: Page) -> None:
    press = closed.keyboard.press
    zoom = closed.locator("#zoom")
    assert zoom.inner_text() == "100%"
    press("+")
    assert zoom.inner_text() == "125%"
    press("-")
    press("-")
    assert zoom.inner_text() == "80%"
    press("0")
    assert zoom.inner_text() == "100%"
    press("/")
    expect(closed.locator("#query")).to_be_focused()
    closed.keyboard.type("+-?0")
    assert closed.locator("#query").input_value() == "+-?0"
    press("Escape")
    press("?")
    assert closed.locator("#help").is_visible()
    press("Escape")
    assert not closed.locator("#help").is_visible()


def test_the_mouse_zooms_and_pans(open_page: Open) -> None:
    page = open_page(page_of(trained_net(), depth=2), viewport={"width": 600, "height": 400})
    scroller = page.locator(".scroller")
    before = place(page, "stem")
    x, y = before["x"] + 10, before["y"] + 10
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    expect(page.locator("#zoom")).to_have_text("149%")
    zoomed = place(page, "stem")
    assert zoomed["width"] == pytest.approx(1.49 * before["width"], rel=0.02)
    top = scroller.evaluate("element => element.scrollTop")
    page.mouse.move(300, 300)
    page.mouse.down()
    page.mouse.move(300, 200, steps=4)
    page.mouse.up()
    assert scroller.evaluate("element => element.scrollTop") == top + 100
    assert not page.locator("#panel").is_visible(), "a drag selects nothing"


def test_each_view_alone(closed: Page) -> None:
    closed.click("#expand")
    for choice, mode, strips in (("Base", "base", 0), ("Folded", "folded", 2), ("Adapted", "adapted", 2)):
        closed.locator(".choices").get_by_text(choice, exact=True).click()
        assert closed.locator(".pane").count() == 1
        assert boxes(closed, mode).count() == 10
        assert closed.locator(f".{mode} .strip").count() == strips


def test_skipped_layers_are_marked_listed_and_explained(closed: Page) -> None:
    assert closed.locator(".leaf.skipped").count() == 2
    assert closed.locator("#skipped").inner_text() == "2 layers not adapted"
    closed.click("#skipped")
    assert closed.locator("#panel .not-adapted li").all_inner_texts() == ["stem", "head"]
    closed.locator("#panel").get_by_text("head").click()
    assert selected(closed) == "head"
    assert "not in target_modules" in closed.locator("#panel .reason").inner_text()
    assert facts(closed)["class"] == "Linear 12→4"


def test_skipped_layers_inside_a_closed_module_are_counted(open_page: Open) -> None:
    page = open_page(page_of(trained_net(target_modules=["up"]), depth=0))
    assert "· 3 not adapted" in (box(page, "blocks.0 … 2").text_content() or "")
    assert "3 not adapted" in (box(page, "blocks.0 … 2").get_attribute("aria-label") or "")
    search(page, "blocks.1.down")
    page.keyboard.press("Enter")
    assert selected(page) == "down"
    assert page.locator("#panel .not-adapted li").all_inner_texts() == [f"blocks.{i}.down" for i in range(3)]
