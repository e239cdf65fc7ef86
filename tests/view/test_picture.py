"""The SVG picture, and the same as PNG."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from drawn_models import Residual, drawing, drawn
from torch import nn

import hra_fx
from hra_fx.reporting.heat import heat_of, scale
from hra_fx.view.drawing import drawing_of
from hra_fx.view.opening import Options
from hra_fx.view.page import SCALE, SIDE, rasterize, render_svg as render
from hra_fx.view.theme import width

SVG = "{http://www.w3.org/2000/svg}"


def picture(name: str | nn.Module, **options: Any) -> ElementTree.Element:
    found = drawing(name) if isinstance(name, str) else drawing_of(name)
    return ElementTree.fromstring(render(found, Options(**options)))


def words(root: ElementTree.Element) -> str:
    return "".join(root.itertext())


@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "attention", "hostile, in Python"])
@pytest.mark.parametrize("options", [{}, {"depth": 0, "heat": "angle"}, {"depth": 2, "heat": "share"}], ids=str)
def test_every_layer_is_on_the_page_once_below_the_legend_with_its_text_inside(
    name: str, options: dict[str, Any]
) -> None:
    root = picture(name, **options)
    assert sum(int(box.get("data-adapted", 0)) for box in root.iter()) == len(drawing(name).rows)
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


def test_heat_has_a_legend_with_numbers_and_a_cell_for_each_site() -> None:
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


def size(png: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    wide, high = struct.unpack(">II", png[16:24])
    return wide, high


def test_a_png_is_the_svg_at_twice_its_size(tmp_path: Path) -> None:
    file = hra_fx.visualize(drawn("resnet"), tmp_path / "a.png", heat="mean_angle")
    root = picture("resnet", heat="mean_angle")
    assert size(file.read_bytes()) == (SCALE * int(root.get("width", "0")), SCALE * int(root.get("height", "0")))


def test_a_large_picture_has_one_pixel_for_a_unit_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    def tall(layers: int) -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(layers)))

    file = hra_fx.visualize(tall(200), tmp_path / "a.png", depth=0)
    assert SIDE / SCALE < size(file.read_bytes())[1] < SIDE
    with pytest.raises(hra_fx.VisualizeError, match=r"would be 2\d,\d\d\d pixels wide or high.*smaller `depth` or a"):
        hra_fx.visualize(tall(400), tmp_path / "b.png", depth=0)
    assert not (tmp_path / "b.png").exists()


def test_a_png_without_any_font_is_refused() -> None:
    text = render(drawing("one layer"), Options())
    with pytest.raises(hra_fx.VisualizeError, match=r"A \.png needs a font, and none was found.*matplotlib.*\.svg"):
        rasterize(text, system_fonts=False, files=[])
    assert size(rasterize(text, system_fonts=False))[0] > 0
