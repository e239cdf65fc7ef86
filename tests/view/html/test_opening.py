"""What a reader finds who opens the page: it is quiet, complete, and shows as much as can be read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import networkx as nx
import pytest
from pages import Block, Net, box, boxes, facts, page_of, search, trained_net
from playwright.sync_api import Page
from torch import Tensor, nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.html.rendering import render
from hra_fx.view.options import Options
from hra_fx.view.tree import Leaf

Open = Callable[..., Page]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "a\"b'c`<b>",
    "层一",
    "zero\x00bell\x07",
    "<img src=x onerror=alert(1)>",
    "{{data}}",
)


def labels(page: Page, mode: str = "adapted") -> list[str]:
    return [label.split(",")[0] for label in boxes(page, mode).evaluate_all("all => all.map(box => box.ariaLabel)")]


def test_the_page_tells_what_it_shows(open_page: Open) -> None:
    model = trained_net()
    page = open_page(page_of(model))
    drawing = drawing_of(model)
    assert page.title() == page.locator("h1").inner_text() == drawing.title == "Net with HRA"
    assert page.locator("#facts").inner_text() == drawing.facts
    assert labels(page) == ["x", "stem", "blocks.0 … 2", "norm", "up", "act", "down", "add", "head", "output"]
    assert "Linear 6→12" in (box(page, "stem").text_content() or "")


class Outer(nn.Module):
    """Modules three deep, of which none is a repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(12, 12), nn.Sequential(Block(12), nn.ReLU()), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.stem(x)))


@pytest.mark.parametrize(
    ("depth", "shown"),
    [(0, {"inner"}), (1, {"inner", "inner.0"}), (9, {"inner", "inner.0", "up"})],
)
def test_so_many_levels_are_open_as_were_asked_for(open_page: Open, depth: int, shown: set[str]) -> None:
    model = hra_fx.transform(Outer(), hra_fx.HRAConfig(r=2, target_modules=["up"]))
    page = open_page(page_of(model, depth=depth))
    assert {label for label in labels(page) if label in ("inner", "inner.0", "up")} == shown
    assert (page.locator(".closed").count() == 0) == (depth >= 2)


def test_a_module_is_shown_by_itself(open_page: Open) -> None:
    page = open_page(page_of(trained_net(), focus="blocks.1"))
    assert page.locator("h1").inner_text() == "blocks.1 in Net with HRA"
    assert {"norm", "up", "act", "down", "add"} < set(labels(page))
    assert "stem" not in labels(page)
    assert search(page, "blocks.1.up") == ["blocks.1.up"]
    assert search(page, "blocks.0.up") == []


@pytest.mark.parametrize("model", [Net(), hra_fx.fold(trained_net())], ids=["plain", "folded"])
def test_a_model_without_adapters_has_a_plain_view(open_page: Open, model: nn.Module) -> None:
    page = open_page(page_of(model))
    assert page.locator("h1").inner_text() == "Net"
    for control in (".choices", "#heat", "#skipped", ".strip"):
        assert not page.locator(control).is_visible()
    box(page, "stem").click()
    assert facts(page)["parameters"] == "84"


def test_layers_that_nothing_turned_are_said_to_be_so(open_page: Open) -> None:
    model = hra_fx.transform(Net(), hra_fx.HRAConfig(r=4, target_modules=["up", "down"]))
    page = open_page(page_of(model))
    assert "not trained yet (identity)" in page.locator("#scale").inner_text()
    page.get_by_text("Folded").click()
    assert page.locator(".folded .strip-words").all_text_contents()[0].startswith("weight unchanged")


def hostile_drawing() -> Drawing:
    """Layers of such names in a row; not all of them can be given to modules that are transformed."""
    picture: nx.DiGraph[str] = nx.DiGraph(traced=frozenset({""}), classes={"": HOSTILE[0]}, details={})
    row = hra_fx.report(trained_net()).rows[0]
    rows = []
    for name in HOSTILE:
        picture.add_node(
            name, leaf=Leaf(name, name, "adapted_layer", name, name, (), (name,), 4, 2, paths=(name,), shape=name)
        )
        rows.append(dataclasses.replace(row, path=name, layer_type=name, adapter=name))
    nx.add_path(picture, HOSTILE)
    return Drawing(HOSTILE[0], HOSTILE[0], HOSTILE[4], picture, tuple(rows), {HOSTILE[1]: HOSTILE[0]})


def test_hostile_names_are_shown_and_do_nothing(open_page: Open) -> None:
    page = open_page(render(hostile_drawing(), Options()))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert page.title() == page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator("script").count() == 2
    assert page.locator("#stage .box.adapted_layer").count() == len(HOSTILE)
    page.click("#skipped")
    assert page.locator("#panel .reason").inner_text() == HOSTILE[0]
    page.click("#regex")
    for name in HOSTILE:
        shown = name.replace("\x00", "\ufffd").replace("\x07", "\ufffd")
        assert search(page, f"^{re.escape(shown)}$") == [shown]
        page.keyboard.press("Enter")
        assert page.locator("#panel h2").inner_text() == shown
        assert facts(page)["path"] == facts(page)["shape"] == shown
        assert page.locator("#panel h3").filter(has_text="Adapter").first.inner_text() == f"Adapter {shown}"
    assert page.locator("img, #stage b, #panel b, #hits script").count() == 0


def test_the_policy_stops_scripts_and_styles_that_are_not_the_pages(browser, tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "page.html"
    file.write_text(page_of(trained_net()), encoding="utf-8", newline="\n")
    page = browser.new_page()
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(file.as_uri())
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "https://example.invalid/x.png";
            image.setAttribute("onerror", "window.ran = true");
            document.body.append(image);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert any("script-src" in text for text in blocked)
    assert any("img-src" in text or "default-src" in text for text in blocked)
    page.close()


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
