"""The heatmap and the panel show the values of the report."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from pages import box, facts, page_of, search, strip, trained_net
from playwright.sync_api import Page

import hra_fx
from hra_fx.reporting.heat import HEATS, color, heat_of, scale
from hra_fx.reporting.row import Row
from hra_fx.view.html.rendering import STEPS

Open = Callable[..., Page]
FILL = "element => getComputedStyle(element).fill"
#: Finds texts that are not inside their box.
OUTSIDE = """() => [...document.querySelectorAll("#scroller text")].filter((text) => {
  const [a, b] = [text, text.closest("g").querySelector(":scope > .frame")].map((part) => part.getBoundingClientRect());
  return a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom;
}).map((text) => text.textContent)"""


def rgb(fill: str) -> str:
    return f"rgb({', '.join(str(int(fill[start : start + 2], 16)) for start in (1, 3, 5))})"


def stepped(value: float, ends: tuple[float, float]) -> str:
    """The color of a value, rounded to one of the page's steps."""
    return color(round((value - ends[0]) / (ends[1] - ends[0]) * STEPS) / STEPS, (0, 1))


def expected(row: Row) -> dict[str, str]:
    return {
        "d": str(row.d),
        "r": str(row.r),
        "parameters": f"{row.parameters:,}",
        "weight change": f"{row.weight_change:.1%}",
        "mean angle": f"{math.degrees(row.mean_angle):.1f}°",
        "largest angle": f"{math.degrees(row.angle):.1f}°",
        "|Q - I|": f"{row.rotation:.3f}",
        "share of the weight": f"{row.share:.1%}",
    }


def test_the_panel_shows_the_row_of_the_report(open_page: Open) -> None:
    model = trained_net()
    page = open_page(page_of(model))
    for row in hra_fx.report(model):
        search(page, row.path)
        page.keyboard.press("Enter")
        shown = facts(page)
        assert {name: shown[name] for name in expected(row)} == expected(row)
        assert float(page.locator("#panel dt:text-is('|QᵀQ - I|') + dd").get_attribute("title") or "nan") == (
            pytest.approx(row.orthogonality)
        )
        angles = page.locator(".spectrum i").evaluate_all("all => all.map(bar => bar.title)")
        assert angles == [f"plane {i}: {math.degrees(a):.2f}°" for i, a in enumerate(row.angles, start=1)]


def test_a_box_of_repeated_layers_has_a_table_with_a_row_for_each(open_page: Open) -> None:
    model = trained_net()
    page = open_page(page_of(model))
    box(page, "down").click()
    rows = [row for row in hra_fx.report(model) if row.path.endswith("down")]
    table = [row.locator("th, td").all_inner_texts() for row in page.locator("#panel tbody tr").all()]
    names = ("weight change", "mean angle", "largest angle")
    assert table == [[row.path, "4", *(expected(row)[name] for name in names)] for row in rows]
    page.locator("#panel tbody").get_by_text("blocks.2.down").click()
    assert facts(page)["|Q - I|"] == f"{rows[2].rotation:.3f}"
    assert page.locator("#panel tr[aria-current]").count() == 1
    box(page, "down").locator(".cell").nth(1).click()
    assert page.locator("#panel h3.instance").inner_text() == "blocks.1.down"
    assert page.locator("#panel .which").inner_text().startswith("Layer 2 of 3")


def test_a_heatmap_has_the_colors_and_means_of_the_report(open_page: Open) -> None:
    """The page opens with the change of the weight."""
    model = trained_net()
    page = open_page(page_of(model))
    box(page, "down").click()
    assert page.locator("#heat").input_value() == "weight_change"
    for name in HEATS:
        page.select_option("#heat", name)
        values = heat_of(hra_fx.report(model).rows, name)
        ends = scale(values.values())
        for layer in ("up", "down"):
            cells = [cell.evaluate(FILL) for cell in box(page, layer).locator(".cell").all()]
            paths = [f"blocks.{index}.{layer}" for index in range(3)]
            assert cells == [rgb(stepped(values[path], ends)) for path in paths]
            mean = sum(values[path] for path in paths) / 3
            assert box(page, layer).locator(".strip").evaluate(FILL) == rgb(stepped(mean, ends))
        assert page.locator("#scale").inner_text().split() == [f"{end:g}{HEATS[name].unit}" for end in ends]
        assert page.evaluate(OUTSIDE) == []
        said = HEATS[name].text(mean)  # of the layers "down", the last ones above
        assert strip(page, "down") == f"r 4 · d 24 · mean {said}"
        assert page.locator("#panel .means h3").inner_text() == "Mean of 3 layers"
        assert page.locator(f"#panel .means dt:text-is('{HEATS[name].words}') + dd").inner_text() == said
    page.select_option("#heat", label="off")
    assert box(page, "down").locator(".strip").evaluate("strip => strip.style.fill") == ""
    assert strip(page, "down") == "r 4 · d 24"
    assert page.locator("#scale").inner_text() == ""
    assert open_page(page_of(model, heat="angle")).locator("#heat").input_value() == "angle"
