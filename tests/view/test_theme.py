"""The colors of light and dark pictures: contrast, that every picture uses them, and the heat."""

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
from hra_fx.view.theme import COLORS, THEMES, as_css

#: What text is written in, and what is behind it.
TEXT = [
    *(
        (ink, paper)
        for ink in ("ink", "faint")
        for paper in ("paper", "card", "module", "port", "untraced", "blue-pale")
    ),
    *(("violet", paper) for paper in ("violet-pale", "card")),
    *(("amber", paper) for paper in ("amber-pale", "untraced")),
    *(("blue", "blue-pale"), ("red", "card"), ("focus", "card")),
]


def luminance(fill: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / 255 for n in bytes.fromhex(fill[1:]))
    ]
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


def test_the_page_has_the_same_colors() -> None:
    for role, pair in COLORS.items():
        assert f"--{role}: light-dark({', '.join(pair)});" in as_css()
    styles = Path(hra_fx.__file__).parent / "view" / "html" / "style"
    used = {role for file in styles.iterdir() for role in re.findall(r"var\(--([a-z-]+)\)", file.read_text("utf-8"))}
    assert used - {"shadow"} <= set(COLORS)


@pytest.mark.parametrize("theme", THEMES)
def test_a_picture_has_the_colors_of_its_theme_only(theme: str, tmp_path: Path) -> None:
    text = hra_fx.visualize(drawn("bert"), tmp_path / "a.svg", theme=theme).read_text("utf-8")  # type: ignore[arg-type]
    assert set(re.findall(r'(?:fill|stroke)="([^"#]*)"', text)) <= {"none"}, "no role is left"
    place = THEMES.index(theme)  # type: ignore[arg-type]
    found = set(re.findall(r'="(#[0-9a-f]{6})"', text))
    assert COLORS["paper"][place] in found
    assert COLORS["paper"][1 - place] not in found


def test_a_page_can_be_dark(tmp_path: Path) -> None:
    text = hra_fx.visualize(drawn("one layer"), tmp_path / "a.html", theme="dark").read_text("utf-8")
    assert '<html lang="en" data-theme="dark">' in text
    assert "data-theme=" not in hra_fx.visualize(drawn("one layer"), tmp_path / "b.html").read_text("utf-8")[:300]


def test_other_formats_have_no_theme(tmp_path: Path) -> None:
    with pytest.raises(hra_fx.VisualizeError, match=r"^`theme` is for \.svg, \.png, \.html, and 'a\.dot' is not one"):
        hra_fx.visualize(drawn("one layer"), tmp_path / "a.dot", theme="dark")
    with pytest.raises(hra_fx.VisualizeError, match=r"^`theme` must be one of 'light', 'dark', got 'sepia'\."):
        hra_fx.visualize(drawn("one layer"), tmp_path / "a.svg", theme="sepia")  # type: ignore[arg-type]


# ---- heat ----


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


def test_the_heat_is_that_of_the_report() -> None:
    rows = hra_fx.report(drawn("resnet")).rows
    for name in HEATS:
        factor = {"mean_angle": 180 / math.pi, "angle": 180 / math.pi, "rotation": 1}.get(name, 100)
        values = heat_of(rows, name)
        assert values == {row.path: pytest.approx(factor * getattr(row, name)) for row in rows}


def test_of_several_adapters_the_largest_counts_and_what_is_unknown_stays_so() -> None:
    row = hra_fx.report(drawn("one layer")).rows[0]
    three = [dataclasses.replace(row, adapter=str(value), rotation=value) for value in (1.0, 3.0, 2.0)]
    assert heat_of(three, "rotation") == {"0": 3.0}
    unknown = [*three, dataclasses.replace(row, rotation=math.nan)]
    assert math.isnan(heat_of(unknown, "rotation")["0"])
    assert math.isnan(heat_of(unknown[::-1], "rotation")["0"])


def test_the_default_is_the_change_of_the_weight() -> None:
    rotated_model = drawing("resnet")
    row = dataclasses.replace(rotated_model.rows[0], angles=(0.1,), weight_change=0.02, mean_angle=0.1)
    shown = heatmap_of(dataclasses.replace(rotated_model, rows=(row,)), None)
    assert (shown.name, shown.values) == ("weight_change", {row.path: pytest.approx(2.0)})
    without_weight = dataclasses.replace(row, weight_change=math.nan)
    assert heatmap_of(dataclasses.replace(rotated_model, rows=(without_weight,)), None).name == "mean_angle"
    fresh = dataclasses.replace(row, angles=())
    assert not heatmap_of(dataclasses.replace(rotated_model, rows=(fresh,)), None).values
