"""The colors of light and dark pictures: contrast, use, and heatmaps."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from drawn_models import drawing, drawn
from hypothesis import example, given, strategies as st

import hra_fx
from hra_fx.reporting.heat import DARK_PALETTE, HEATS, PALETTE, color, heat_of, ink_on, scale
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.theme import COLORS, THEMES

PAPERS = ("paper", "card", "module", "port", "untraced", "blue-pale")
#: Colors of text and of its background.
TEXT = [
    *((ink, paper) for ink in ("ink", "faint") for paper in PAPERS),
    *(("violet", "violet-pale"), ("violet", "card"), ("amber", "amber-pale"), ("amber", "untraced")),
    *(("blue", "blue-pale"), ("red", "card"), ("focus", "card")),
]


def luminance(fill: str) -> float:
    parts = (part / 255 for part in bytes.fromhex(fill[1:]))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("place", range(len(THEMES)), ids=THEMES)
def test_text_can_be_read(place: int) -> None:
    found = {pair: contrast(*(COLORS[role][place] for role in pair)) for pair in TEXT}
    fills = [color(step / 20, (0, 1), (PALETTE, DARK_PALETTE)[place]) for step in range(21)]
    assert min([*found.values(), *(contrast(fill, ink_on(fill)) for fill in fills)]) >= 4.5, found


def test_the_styles_of_the_page_use_only_these_colors() -> None:
    styles = Path(hra_fx.__file__).parent / "view" / "html" / "style"
    used = {role for file in styles.iterdir() for role in re.findall(r"var\(--([a-z-]+)\)", file.read_text("utf-8"))}
    assert used - {"shadow"} <= set(COLORS)


@pytest.mark.parametrize("place", range(len(THEMES)), ids=THEMES)
def test_a_picture_has_the_colors_of_its_theme_only(place: int, tmp_path: Path) -> None:
    text = hra_fx.visualize(drawn("bert"), tmp_path / "a.svg", theme=THEMES[place]).read_text("utf-8")
    assert set(re.findall(r'(?:fill|stroke)="([^"#]*)"', text)) <= {"none"}, "no role is left"
    found = set(re.findall(r'="(#[0-9a-f]{6})"', text))
    assert COLORS["paper"][place] in found and COLORS["paper"][1 - place] not in found


def test_a_page_can_be_dark(tmp_path: Path) -> None:
    text = hra_fx.visualize(drawn("one layer"), tmp_path / "a.html", theme="dark").read_text("utf-8")
    assert '<html lang="en" data-theme="dark">' in text
    assert "data-theme=" not in hra_fx.visualize(drawn("one layer"), tmp_path / "b.html").read_text("utf-8")[:300]


# ---- heatmaps ----


@given(st.lists(st.floats(0, 1e9), min_size=1))
@example([5e-324])
def test_a_scale_is_round_and_holds_all_values(values: list[float]) -> None:
    bottom, top = scale(values)
    low, high = min(values), max(values)
    assert bottom <= low * (1 + 1e-5) and top >= high * (1 - 1e-5)
    if high - low > 1e-2 * high and high > 1e-200:
        assert (top - bottom) <= 1.5 * (high - low), "it fits the values"
    else:
        assert bottom <= low <= high * (1 + 1e-6) <= max(top * (1 + 1e-5), 1.0)


def test_a_heatmap_has_the_values_of_the_report_and_the_largest_of_several_adapters() -> None:
    rows = hra_fx.report(drawn("resnet")).rows
    for name in HEATS:
        factor = {"mean_angle": 180 / math.pi, "angle": 180 / math.pi, "rotation": 1}.get(name, 100)
        assert heat_of(rows, name) == {row.path: pytest.approx(factor * getattr(row, name)) for row in rows}
    three = [dataclasses.replace(rows[0], path="0", rotation=value) for value in (1.0, 3.0, 2.0)]
    assert heat_of(three, "rotation") == {"0": 3.0}
    unknown = [*three, dataclasses.replace(three[0], rotation=math.nan)]
    assert all(math.isnan(heat_of(rows, "rotation")["0"]) for rows in (unknown, unknown[::-1]))


def test_the_default_is_the_change_of_the_weight() -> None:
    found = drawing("resnet")
    row = dataclasses.replace(found.rows[0], angles=(0.1,), weight_change=0.02, mean_angle=0.1)
    shown = heatmap_of(dataclasses.replace(found, rows=(row,)), None)
    assert (shown.name, shown.values) == ("weight_change", {row.path: pytest.approx(2.0)})
    without_weight = dataclasses.replace(row, weight_change=math.nan)
    assert heatmap_of(dataclasses.replace(found, rows=(without_weight,)), None).name == "mean_angle"
    fresh = dataclasses.replace(row, angles=())
    assert not heatmap_of(dataclasses.replace(found, rows=(fresh,)), None).values
