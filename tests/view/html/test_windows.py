"""The page in windows of several sizes: nothing covers the drawing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pages import box, page_of, place, trained_net
from playwright.sync_api import Page, expect
from torch import nn

Open = Callable[..., Page]

#: Whether one element lies on another one.
COVERS = """([one, other]) => {
  const [a, b] = [one, other].map((name) => document.querySelector(name).getBoundingClientRect());
  return a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
}"""


@pytest.mark.parametrize("width", [1440, 420])
def test_nothing_covers_the_drawing(open_page: Open, width: int) -> None:
    page = open_page(page_of(trained_net(target_modules=["up"])), viewport={"width": width, "height": 800})
    for opened in (False, True):
        if opened:
            box(page, "up").click()
        assert page.locator("#panel").is_visible() == opened
        for part in ("#legend", ".top", *["#panel"] * opened):
            assert not page.evaluate(COVERS, [part, "#stage"]), part
        assert page.locator("#legend").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_phone_has_a_small_toolbar_and_the_left_edge_of_the_drawing(open_page: Open) -> None:
    page = open_page(page_of(trained_net(), depth=2), viewport={"width": 420, "height": 800})
    height = page.locator(".top").evaluate("element => element.getBoundingClientRect().height")
    assert height <= 140
    assert page.locator("#scroller").evaluate("element => element.scrollLeft") == 0
    assert place(page, "x")["x"] >= 0
    box(page, "down").click()
    stage, panel = (page.locator(part).bounding_box() for part in ("#stage", "#panel"))
    assert stage and panel and stage["height"] + panel["height"] < 800 - height
    expect(box(page, "down").locator(":scope > .frame")).to_be_in_viewport(ratio=0.9)


def test_a_layer_that_should_have_an_adapter_is_red_and_others_are_not(open_page: Open) -> None:
    model = trained_net(modules_to_save=["head"])
    model.blocks[0].up = nn.Linear(12, 24)  # it is targeted, and has no adapter
    page = open_page(page_of(model))
    line = "element => getComputedStyle(element).stroke"
    for mark, color in ((".refused", "rgb(204, 66, 55)"), (".skipped", "rgb(123, 134, 150)")):
        assert page.locator(f"#scroller {mark}").count() == 1
        assert page.locator(f"#scroller {mark}").evaluate(line) == color
    assert page.locator("#scroller .trained > .frame").evaluate(line) == "rgb(75, 134, 196)"
    assert page.locator("#skipped.alarm").count() == 1
    words = page.locator("#legend li").all_text_contents()
    assert {"1 layer not targeted", "1 layer targeted, but not adapted", "trained in full"} <= set(words)
    quiet = open_page(page_of(trained_net()))
    assert quiet.locator(".refused, .alarm").count() == 0
