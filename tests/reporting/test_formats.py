"""The formats of a report: terminal, JSON and notebook."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html import unescape

import pytest
from reporting.made import HOSTILE, adapted, blocks, report_of, row
from rich.console import Console

import hra_fx
from hra_fx.reporting.report import Report
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer

WORDS = ["layer", "r", "params", "weight change", "mean angle"]


def in_terminal(found: Report, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def in_notebook(found: Report) -> str:
    return str(found._repr_mimebundle_([], [])["text/html"])


def heading_line(text: str) -> str:
    return next(line for line in text.splitlines() if " layer " in f"{line} ")


def test_a_narrow_terminal_wraps_cells_and_loses_nothing() -> None:
    found = hra_fx.report(adapted())
    (only,) = found.rows
    text = in_terminal(found, 200)
    places = [f"{heading_line(text)} ".index(f" {name} ") for name in WORDS]
    assert places == sorted(places)
    for shown in (f"{math.degrees(only.mean_angle):.1f}°", f"{100 * only.weight_change:.1f}%"):
        assert shown in text
    assert "1 adapted layer, 12 adapter parameters (48 bytes), adapter default\n" in text
    found = report_of(*blocks(2, "q_proj", "v_proj"))
    wanted = Counter("".join(in_terminal(found, 200).split()).replace("─", ""))
    for width in range(130, 60, -10):
        text = in_terminal(found, width)
        assert all(len(line) <= width for line in text.splitlines())
        assert Counter("".join(text.split()).replace("─", "")) == wanted


def test_several_adapters_have_a_column() -> None:
    found = report_of(row("a", adapter="first"), row("a", adapter="second"))
    assert " adapter " in heading_line(str(found))
    assert "1 adapted layer, 32 adapter parameters, adapters first, second" in str(found)
    assert " adapter " not in heading_line(str(report_of(row("a"))))
    assert "not trained yet (identity)" in str(report_of(row(angles=()))) and "not trained" not in str(found)


@pytest.mark.parametrize(
    ("angle", "shown"), [(0.0, " 0°\n"), (1e-6, "0.000057°"), (1e-9, "6e-8°"), (0.01, "0.6°"), (math.nan, "unknown")]
)
def test_small_angles_are_not_rounded_away(angle: float, shown: str) -> None:
    assert shown in str(report_of(row(mean_angle=angle)))


def test_names_are_not_interpreted_as_markup() -> None:
    found = report_of(row(HOSTILE), skipped=(SkippedLayer(HOSTILE, "x", HOSTILE),))
    assert in_terminal(found, 400).count(HOSTILE) == str(found).count(HOSTILE) == 3
    page = in_notebook(found)
    assert not re.search(r"[^-]color:|#[0-9a-f]{6}", page), "readable on light and dark backgrounds"
    assert set(re.findall(r"</?(\w+)", page)) == {"pre", "span"}
    assert "<script>" in "".join(unescape(re.sub(r"<[^>]*>", "", page)).split())


def test_footnotes() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "|Q'Q - I| is up to 2e-02, at bad (default)" in str(found)
    assert "not orthogonal" not in str(report_of(row("good")))
    skipped = tuple(SkippedLayer(f"part{index}.fc", "Linear", f"reason {index}") for index in range(9))
    text = str(report_of(row(), skipped=skipped))
    assert text.count("reason ") == 6
    assert "  3 more layers, for 3 other reasons\n" in text


def test_json_is_valid_and_has_null_for_numbers_that_are_not_finite() -> None:
    found = report_of(
        row(HOSTILE, share=math.nan, angles=(math.nan,), rotation=math.inf), skipped=(SkippedLayer("a", "b", "c"),)
    )
    content = json.loads(found.to_json(), parse_constant=pytest.fail)
    (only,) = content["rows"]
    assert (only["path"], only["share"], only["angles"], only["rotation"]) == (HOSTILE, None, [None], None)
    assert content["skipped"] == [{"path": "a", "layer_type": "b", "reason": "c", "targeted": False}]
    finite = report_of(*blocks(2, "q_proj"))
    assert json.loads(finite.to_json(indent=2))["rows"] == finite.to_dicts()


def test_an_empty_report_has_every_form() -> None:
    for text in (str(report_of()), in_notebook(report_of())):
        assert "0 adapted layers" in text
    lists = ("rows", "skipped", "trained_in_full", "skipped_parameters")
    assert json.loads(report_of().to_json()) == {name: [] for name in lists}


def test_repeated_layers_are_one_line_with_the_ranges_of_their_values() -> None:
    names = ("attention.self.query", "attention.self.value")
    rows = [
        row(f"encoder.layer.{i}.{name}", weight_change=0.115 + 0.001 * i, mean_angle=math.radians(79 + 11 * i))
        for i in range(3)
        for name in names
    ]
    text = in_terminal(report_of(*rows, row("head")), 120).splitlines()
    wanted = "encoder.layer.*.attention.self.query x3 2 48 11.5 to 11.7% 79.0 to 101.0°"
    assert any(" ".join(line.split()).startswith(wanted) for line in text)
    assert any(line.split()[:3] == ["head", "2", "16"] for line in text)
    assert sum("attention" in line for line in text) == 2


@pytest.mark.parametrize(
    "other",
    [
        *({"r": 4}, {"d": 9}, {"adapter": "b"}, {"active": False}, {"layer_type": "Linear 9->4"}),
        *({"weight_change": math.nan}, {"rotation": math.nan}, {"path": "n.1.q"}),
    ],
    ids=str,
)
def test_layers_that_differ_in_anything_else_are_separate_lines(other: dict[str, object]) -> None:
    same = row("m.0.q")
    assert "m.*.q x2" in str(report_of(same, row("m.1.q")))
    assert " x2" not in str(report_of(same, row(**{"path": "m.1.q", **other})))  # type: ignore[arg-type]


PATHS = [f"stages.{stage}.blocks.{block}.fc" for stage in range(2) for block in range(3)]


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([row(path, d=8 + int(path[7])) for path in PATHS], ["stages.0.blocks.*.fc x3", "stages.1.blocks.*.fc x3"]),
        ([row(path) for path in PATHS], ["stages.*.blocks.*.fc x6"]),
        ([row(f"layers.{index}.to_out.0") for index in range(3)], ["layers.*.to_out.0 x3"]),
        ([row("3.fc"), row("0")], ["3.fc", "0"]),
        (
            [row(f"m.{i}.fc", layer_type=f"Linear {i % 2}") for i in range(4)],
            ["m.*.fc x2   Linear 0", "m.*.fc x2   Linear 1"],
        ),
    ],
)
def test_only_indices_that_differ_are_stars(rows: list[Row], names: list[str]) -> None:
    lines = in_terminal(report_of(*rows), 200).splitlines()
    for line, name in zip(lines[4:], names, strict=False):
        assert line.strip().startswith(f"{name}   ")


def test_a_heatmap_is_no_longer_plotted() -> None:
    with pytest.raises(AttributeError, match=r"Report\.plot_heatmap was removed in 0\.5\. Plot "):
        report_of(row()).plot_heatmap("a.svg")


def test_a_table_that_is_printed_in_a_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report_of(*blocks(3, "q_proj", "v_proj"))
    assert max(map(len, str(found).splitlines())) > 70
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, str(found).splitlines())) <= 70
