"""The SVG picture."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from drawn_models import Residual, drawing, drawn
from torch import nn

import hra_fx
from hra_fx.reporting.heat import heat_of, scale
from hra_fx.view.drawing import drawing_of
from hra_fx.view.opening import Options
from hra_fx.view.svg_file import render_svg as render
from hra_fx.view.theme import width

SVG = "{http://www.w3.org/2000/svg}"


def picture(name: str | nn.Module, **options: Any) -> ElementTree.Element:
    found = drawing(name) if isinstance(name, str) else drawing_of(name)
    return ElementTree.fromstring(render(found, Options(**options)))


def words(root: ElementTree.Element) -> str:
    return "".join(root.itertext())


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "attention", "hostile, in Python"])
@pytest.mark.parametrize("options", [{}, {"depth": 0, "heat": "angle"}, {"depth": 2, "heat": "share"}], ids=str)
def test_boxes_are_inside_the_picture_below_the_legend_with_their_text_inside(
    name: str, options: dict[str, Any]
) -> None:
    root = picture(name, **options)
    tags = {"svg", "title", "defs", "marker", "path", "rect", "g", "text", "tspan", "circle"}
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= tags, "it loads nothing"
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    for box in root.iter(f"{SVG}rect"):
        if box.get("width") != "100%":
            x, y, w, h = (float(box.get(key, "nan")) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and x + w <= wide and y + h <= high
    card = next(box for box in root if box.get("rx") == "10")
    assert max(float(line.get("y", "0")) for line in root.findall(f"{SVG}text")) < float(card.get("y", "0"))
    for group in root.iter(f"{SVG}g"):
        if group.get("class") in ("adapted_layer", "plain", "closed"):
            room = float(group.find(f"{SVG}rect").get("width", "0"))  # type: ignore[union-attr]
            for line in group.findall(f"{SVG}text"):
                assert width(words(line), float(line.get("font-size", "0"))) <= room


def test_a_heatmap_has_a_legend_with_numbers_and_a_cell_for_each_layer() -> None:
    root = picture("bert", heat="mean_angle", depth=0)
    ends = scale(heat_of(hra_fx.report(drawn("bert")).rows, "mean_angle").values())
    assert {"mean angle:", *(f"{end:g}°" for end in ends)} <= {line.text for line in root.iter(f"{SVG}text")}
    closed = [group for group in root.iter(f"{SVG}g") if group.get("class") == "closed"]
    cells = [str(cell.text).partition(" · ")[0] for group in closed for cell in group.findall(f"{SVG}rect/{SVG}title")]
    assert sorted(cells) == sorted(row.path for row in hra_fx.report(drawn("bert")) if "layer" in row.path)


def test_a_layer_that_should_have_an_adapter_is_marked_in_red() -> None:
    model = hra_fx.transform(nn.Sequential(Residual(), Residual()), hra_fx.HRAConfig(r=2, target_modules=["fc1"]))
    model[1].fc1 = nn.Linear(4, 8)  # it is targeted, and has no adapter
    text = render(drawing_of(model), Options(depth=2))
    assert len(re.findall(r'<circle [^>]*class="refused"', text)) == 1 + 1, "the layer, and the legend"
    assert len(re.findall(r'<circle [^>]*class="skipped"', text)) == 2 + 1
    assert "1 layer targeted, but not adapted" in text and "2 layers not targeted" in text
