"""What the page shows when it is opened."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import networkx as nx
import pytest
from pages import Net, box, boxes, facts, page_of, search, trained_net
from playwright.sync_api import Page
from torch import nn

import hra_fx
from hra_fx.reporting.skipped_layers import SkippedLayer
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options
from hra_fx.view.tree import Leaf

Open = Callable[..., Page]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "a\"b'c`<b>",
    "层一",
    "<img src=x onerror=alert(1)>",
    "{{data}}",
)


def labels(page: Page) -> list[str]:
    return [label.split(",")[0] for label in boxes(page).evaluate_all("all => all.map(box => box.ariaLabel)")]


def test_title_facts_and_boxes(open_page: Open) -> None:
    model = trained_net()
    page = open_page(page_of(model))
    drawing = drawing_of(model)
    assert page.title() == page.locator("h1").inner_text() == drawing.title == "Net with HRA"
    assert page.locator("#facts").inner_text() == drawing.facts
    assert labels(page) == ["x", "stem", "blocks.0 … 2", "norm", "up", "act", "down", "add", "head", "output"]
    assert "Linear 6→12" in (box(page, "stem").text_content() or "")


def test_every_box_is_in_one_picture_and_pictures_stay_small(open_page: Open) -> None:
    """A model of 32 blocks that all differ."""
    blocks = (nn.Sequential(nn.Linear(8, 8 + i), nn.ReLU(), nn.Linear(8 + i, 8)) for i in range(32))
    model = hra_fx.transform(nn.Sequential(*blocks), hra_fx.HRAConfig(r=2, target_modules="all-linear"))
    text = page_of(model, depth=0)
    shown = re.findall(r'<g class="(?!root|traced)[^"]*" data-index="(\d+)"', text)
    assert len(shown) == len(set(shown)) == 34 + 3 * 32
    page = open_page(text)
    for block in ("0", "31"):
        assert search(page, f"{block}.2")[0] == f"{block}.2"
        page.keyboard.press("Enter")
    parts = {block: [f"{block}.{part}" for part in range(3)] for block in ("0", "31")}
    assert labels(page) == [
        "input",
        *(name for block in range(32) for name in (str(block), *parts.get(str(block), ()))),
        "output",
    ]


@pytest.mark.parametrize("model", [Net(), hra_fx.fold(trained_net())], ids=["plain", "folded"])
def test_a_model_without_adapters_has_a_plain_view(open_page: Open, model: nn.Module) -> None:
    page = open_page(page_of(model))
    assert page.locator("h1").inner_text() == "Net"
    for control in ("#heat", "#skipped", "#scroller .strip"):
        assert not page.locator(control).is_visible()
    box(page, "stem").click()
    assert facts(page)["parameters"] == "84"


def hostile_drawing() -> Drawing:
    """A chain of layers with names that modules cannot all have."""
    picture: nx.DiGraph[str] = nx.DiGraph(traced=frozenset({""}), classes={"": HOSTILE[0]}, details={})
    row = hra_fx.report(trained_net()).rows[0]
    rows = []
    for name in HOSTILE:
        picture.add_node(
            name, leaf=Leaf(name, name, "adapted_layer", name, name, (), (name,), 4, 2, paths=(name,), shape=name)
        )
        rows.append(dataclasses.replace(row, path=name, layer_type=name, adapter=name))
    nx.add_path(picture, HOSTILE)
    skipped = (SkippedLayer(HOSTILE[1], "", HOSTILE[0]),)
    return Drawing(HOSTILE[0], HOSTILE[0], HOSTILE[4], picture, tuple(rows), skipped)


def test_hostile_names_are_shown_and_do_nothing(open_page: Open) -> None:
    page = open_page(render(hostile_drawing(), Options()))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert page.title() == page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator("script").count() == 2
    assert page.locator("#scroller .adapted_layer").count() == len(HOSTILE)
    page.click("#skipped")
    assert page.locator("#panel .reason").inner_text() == HOSTILE[0]
    for name in HOSTILE:
        assert search(page, f"^{re.escape(name)}$") == [name]
        page.keyboard.press("Enter")
        assert page.locator("#panel h2").inner_text() == name
        assert facts(page)["path"] == facts(page)["shape"] == name
        assert page.locator("#panel h3").filter(has_text="Adapter").first.inner_text() == f"Adapter {name}"
    assert page.locator("img, #scroller b, #panel b, #hits script").count() == 0


def luminance(page: Page, selector: str) -> float:
    color = page.locator(selector).first.evaluate("element => getComputedStyle(element).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_dark_and_light_follow_the_system_and_the_button(open_page: Open) -> None:
    text = page_of(trained_net())
    light, dark = open_page(text, color_scheme="light"), open_page(text, color_scheme="dark")
    assert luminance(light, "body") > 200 > 60 > luminance(dark, "body")
    for page in (light, dark):
        page.click("#theme")
    assert luminance(dark, "body") > 200 > 60 > luminance(light, "body")
    light.emulate_media(media="print")
    assert luminance(light, "body") > 200, "paper is never dark"
