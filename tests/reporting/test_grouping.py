"""Reports in a terminal: layers that repeat are one line."""

from __future__ import annotations

import math

import pytest
import torch
from reporting.made import adapted, blocks, report_of, row
from rich.console import Console
from torch import nn

import hra_fx
from hra_fx.reporting.columns import grouped
from hra_fx.reporting.result import Report
from hra_fx.reporting.row import change_of


def lines(found: Report, width: int = 80) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(found)
    return capture.get().splitlines()


def test_repeated_layers_are_one_line_with_the_ranges_of_their_values() -> None:
    names = ("attention.self.query", "attention.self.value")
    rows = [
        row(f"encoder.layer.{i}.{name}", weight_change=0.05 + 0.01 * i, mean_angle=math.radians(79 + 11 * i))
        for i in range(3)
        for name in names
    ]
    text = lines(report_of(*rows, row("head")), width=120)
    wanted = "encoder.layer.*.attention.self.query x3 2 48 5.0 to 7.0% 79 to"
    assert any(" ".join(line.split()).startswith(wanted) for line in text)
    assert any(line.split()[:3] == ["head", "2", "16"] for line in text)
    assert sum("attention" in line for line in text) == 2


def test_every_row_is_in_the_other_formats() -> None:
    found = report_of(*blocks(4, "q_proj"))
    for text in (found.to_json(), found.to_markdown()):
        assert all(entry.path in text for entry in found)


def test_layers_that_differ_otherwise_stay_apart() -> None:
    same = row("m.0.q")
    for other in (
        {"r": 4},
        {"d": 9},
        {"adapter": "b"},
        {"active": False},
        {"layer_type": "Linear 9->4"},
        {"weight_change": math.nan},
        {"rotation": math.nan},
    ):
        assert len(grouped([same, row("m.1.q", **other)])) == 2
    assert [group.name for group in grouped([same, row("m.1.q"), row("n.1.q")])] == ["m.*.q", "n.1.q"]


def test_80_columns_have_the_layer_its_rank_its_parameters_and_its_change() -> None:
    """With the names and sizes of MiniLM."""
    names = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    fields = {"r": 8, "d": 384, "parameters": 3072, "weight_change": 0.0831, "mean_angle": 0.5}
    rows = [row(f"encoder.encoder.layer.{i}.{name}", **fields) for i in range(6) for name in names]
    text = lines(report_of(*rows))
    (head,) = (line for line in text if " layer " in line)
    assert head.split() == ["layer", "(in", "encoder.encoder)", "r", "params", "weight", "change", "mean", "angle"]
    assert max(map(len, text)) <= 80
    assert any("layer.*.attention.output.dense x6   8   18,432" in line for line in text), "the name is not broken"


def test_a_fresh_adapter_is_not_trained_yet() -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(6, 8)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    assert "not trained yet (identity)" in str(hra_fx.report(model))
    assert "not trained yet (identity)" in hra_fx.report(model).to_markdown()
    assert "not trained yet" not in str(hra_fx.report(adapted()))


def test_a_table_that_is_printed_in_a_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report_of(*blocks(3, "q_proj", "v_proj"))
    assert max(map(len, str(found).splitlines())) > 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(found).splitlines())) <= 80


def test_a_change_of_experts_is_that_of_all_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    chain = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    moved = []
    for weight, vectors in zip(rows, chain, strict=True):
        q = torch.eye(4, dtype=torch.float64)
        for u in vectors.T:
            q = q @ (torch.eye(4, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
        moved.append(weight @ q - weight)
    wanted = float(torch.stack(moved).norm() / rows.norm())
    assert change_of(rows, chain).change == pytest.approx(wanted)
