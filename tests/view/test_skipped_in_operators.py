"""Skipped layers in graphs of operators, which have no node for a layer: its mark is where its weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hra_fx


class Net(nn.Module):
    """Of its three layers one is adapted; circular padding makes two operators of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)
        self.c = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.c(self.a(x)[:, None])[:, 0])
        return y


def program() -> Any:
    exported = torch.export.export(Net(), (torch.randn(2, 8),))
    return hra_fx.transform(exported, hra_fx.HRAConfig(r=2, target_modules=["a"]))


def skipped_at(model: Any) -> list[str]:
    """The modules of the nodes that are marked."""
    graph = hra_fx.to_networkx(model)
    return sorted(data["module"] for _, data in graph.nodes(data=True) if "skipped" in data)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, in run_decompositions
def test_a_program_marks_each_skipped_layer_once() -> None:
    adapted = program()
    for form in (adapted, adapted.run_decompositions()):
        assert skipped_at(form) == ["b", "c"] == sorted(layer.path for layer in hra_fx.report(form).skipped)


@pytest.mark.parametrize("depth", [None, 0])
def test_files_for_other_programs_have_every_reason(depth: int | None, tmp_path: Path) -> None:
    dot = hra_fx.visualize(program(), tmp_path / "a.dot", depth=depth).read_text(encoding="utf-8")
    for path in ("b", "c"):
        assert dot.count(f"{path} has no adapter: ") == 1


def test_a_module_that_is_one_box_tells_of_the_layers_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=r"1"))
    reasons = [data.get("skipped") for _, data in hra_fx.to_networkx(model).nodes(data=True)]
    assert [reason for reason in reasons if reason] == ["not matched by target_modules='1'"]
