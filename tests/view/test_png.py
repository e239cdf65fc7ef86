"""The picture as pixels: its size, and that text is there with the fonts of a machine, with one font, or not at all."""

from __future__ import annotations

import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from drawn_models import drawing, drawn
from torch import nn

import hra_fx
from hra_fx.view.opening import Options
from hra_fx.view.page import SCALE, SIDE, rasterize, render_svg as render


def size(png: bytes) -> tuple[int, int]:
    """Width and height from the header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    wide, high = struct.unpack(">II", png[16:24])
    return wide, high


def test_a_png_is_the_svg_at_twice_its_size(tmp_path: Path) -> None:
    file = hra_fx.visualize(drawn("resnet"), tmp_path / "a.png", heat="mean_angle")
    root = ElementTree.fromstring(render(drawing("resnet"), Options(heat="mean_angle")))
    assert size(file.read_bytes()) == (SCALE * int(root.get("width", "0")), SCALE * int(root.get("height", "0")))


def tall(layers: int) -> nn.Sequential:
    """A chain whose picture, all open, is very high."""
    return nn.Sequential(*(nn.Linear(4 + i % 2, 4 + (i + 1) % 2) for i in range(layers)))


def test_a_large_picture_has_one_pixel_for_a_unit_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    file = hra_fx.visualize(tall(200), tmp_path / "a.png", depth=0)
    assert SIDE / SCALE < size(file.read_bytes())[1] < SIDE
    with pytest.raises(hra_fx.VisualizeError, match=r"would be 2\d,\d\d\d pixels wide or high.*smaller `depth` or a"):
        hra_fx.visualize(tall(400), tmp_path / "b.png", depth=0)
    assert not (tmp_path / "b.png").exists()


def test_a_picture_without_any_font_is_refused() -> None:
    text = render(drawing("one layer"), Options())
    with pytest.raises(hra_fx.VisualizeError, match=r"A \.png needs a font, and none was found.*matplotlib.*\.svg"):
        rasterize(text, system_fonts=False, files=[])
    assert size(rasterize(text, system_fonts=False))[0] > 0
