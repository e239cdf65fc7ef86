"""The formats of a report: terminal, JSON and notebook."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import hra_fx

#: Contains markup of HTML, Markdown, JSON and rich.
HOSTILE = "<script>alert('&')</script>|`*[red]_x_[/red]\\\"~#"
_LAYERS = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
REPORT = hra_fx.report(hra_fx.transform(_LAYERS, hra_fx.HRAConfig(r=2, target_modules=["0"])))


def row(path: str = "layer", **fields: Any) -> Any:
    return replace(REPORT.rows[0], path=path, **fields)


def report_of(*rows: Any, skipped: tuple[Any, ...] = ()) -> Any:
    return replace(REPORT, rows=rows, skipped=skipped)


def in_notebook(found: Any) -> str:
    return str(found._repr_mimebundle_([], [])["text/html"])


@pytest.mark.parametrize(
    ("angle", "shown"), [(0.0, " 0°\n"), (1e-6, "5.7e-05°"), (0.01, "0.6°"), (math.nan, "unknown")]
)
def test_small_angles_are_not_rounded_away(angle: float, shown: str) -> None:
    assert shown in str(report_of(row(mean_angle=angle)))


def test_names_are_not_interpreted_as_markup() -> None:
    skipped = replace(REPORT.skipped[0], path=HOSTILE, reason=HOSTILE)
    found = report_of(row(HOSTILE), skipped=(skipped,))
    console = Console(width=400, no_color=True)
    with console.capture() as in_terminal:
        console.print(found)
    assert in_terminal.get().count(HOSTILE) == str(found).count(HOSTILE) == 3
    page = in_notebook(found)
    assert not re.search(r"[^-]color:|#[0-9a-f]{6}", page), "readable on light and dark backgrounds"
    assert set(re.findall(r"</?(\w+)", page)) == {"pre", "span"}
    assert "<script>" in "".join(unescape(re.sub(r"<[^>]*>", "", page)).split())


def test_json_is_valid_and_has_null_for_numbers_that_are_not_finite() -> None:
    odd = row(HOSTILE, weight_change=math.nan, moved=None, angle=math.inf)
    content = json.loads(report_of(odd, skipped=REPORT.skipped).to_json(), parse_constant=pytest.fail)
    (only,) = content["rows"]
    assert (only["path"], only["weight_change"], only["moved"], only["angle"]) == (HOSTILE, None, None, None)
    reason = "not in target_modules=['0']"
    assert content["skipped"] == [{"path": "1", "layer_type": "Linear 4->4", "reason": reason, "targeted": False}]
    assert json.loads(REPORT.to_json(indent=2))["rows"] == REPORT.to_dicts()


def test_an_empty_report_has_every_form() -> None:
    for text in (str(report_of()), in_notebook(report_of())):
        assert "0 adapted layers" in text
    lists = ("rows", "skipped", "trained_in_full")
    assert json.loads(report_of().to_json()) == {name: [] for name in lists}


def test_repeated_layers_are_one_line_with_the_ranges_of_their_values() -> None:
    rows = [
        row(f"encoder.{i}.{name}", weight_change=0.115 + 0.001 * i, mean_angle=math.radians(79 + 11 * i))
        for i in range(3)
        for name in ("query", "value")
    ]
    lines = [" ".join(line.split()) for line in str(report_of(*rows, row("head"))).splitlines()]
    assert [line for line in lines if "encoder" in line] == [
        f"encoder.*.{name} x3 2 24 11.5 to 11.7% 79.0 to 101.0°" for name in ("query", "value")
    ]
    assert any(line.startswith("head 2 8 ") for line in lines)
    same, other = row("m.0.q"), {"path": "m.1.q"}
    assert "m.*.q x2" in str(report_of(same, row(**other)))
    for differs in ({"r": 4}, {"adapter": "b"}, {"active": False}, {"weight_change": math.nan}, {"path": "n.1.q"}):
        assert " x2" not in str(report_of(same, row(**other | differs)))


def test_a_footnote_names_vectors_that_are_not_orthogonal() -> None:
    found = report_of(row("good"), row("bad", orthogonality=0.02), row("none", orthogonality=math.nan))
    assert "Q is not orthogonal (|Q'Q - I| > 0.001):\n  bad\n" in str(found)
    assert "not orthogonal" not in str(REPORT)
