"""The formats of a report: terminal, JSON and notebook."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest
from reporting.made import HOSTILE, blocks, report_of, row
from rich.console import Console

from hra_fx.reporting.report import Report
from hra_fx.reporting.skipped_layers import SkippedLayer


def in_terminal(found: Report, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(found)
    return capture.get()


def in_notebook(found: Report) -> str:
    return str(found._repr_mimebundle_([], [])["text/html"])


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


def test_a_footnote_names_vectors_that_are_not_orthogonal() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "|Q'Q - I| is up to 2e-02, at bad (default)" in str(found)
    assert "not orthogonal" not in str(report_of(row("good")))


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


def test_a_heatmap_is_no_longer_plotted() -> None:
    with pytest.raises(AttributeError, match=r"Report\.plot_heatmap was removed in 0\.5\. Plot "):
        report_of(row()).plot_heatmap("a.svg")
