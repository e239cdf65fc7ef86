"""The picture of speed in README.md shows the table in docs/benchmarks.md."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from speed.readme_plot import LOOKS, SIZES, TABLE, main, ratios

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def texts(file: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_published_picture_has_the_numbers_of_the_table(theme: str) -> None:
    words = texts(DOCS / f"speed-{theme}.svg")
    for curve in ratios(PAGE).values():
        for value in curve.values():
            assert (f"{value:.1f}×" if value >= 10 else f"{value:.2f}×") in words
    assert {*LOOKS, *(f"{size} tokens" for size in SIZES)} <= set(words)


def test_the_rows_are_those_of_float32() -> None:
    rows = [line for line in PAGE.partition(TABLE)[2].partition("\n### ")[0].splitlines() if "| float32 |" in line]
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        tokens = int(cells[1].split()[0])
        if tokens in SIZES:
            assert f"{ratios(PAGE)['hra_fx'][tokens]:.2f}" == f"{float(cells[7]):.2f}"


def test_it_is_written_for_both_themes(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text(PAGE, encoding="utf-8")
    main(tmp_path)
    for theme in ("light", "dark"):
        assert (tmp_path / f"speed-{theme}.svg").read_bytes() == (DOCS / f"speed-{theme}.svg").read_bytes()
