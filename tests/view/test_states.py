"""What is drawn of adapters that are merged or off, of single layers, and of layers without an adapter in programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import HRAWarning, VisualizeError


def two_adapters() -> Any:
    layers = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    model = hra_fx.transform(layers, hra_fx.HRAConfig(r=4, target_modules=["0", "2"]))
    hra_fx.add_adapter(model, "two", hra_fx.HRAConfig(r=2, target_modules=["0"]))
    hra_fx.set_adapter(model, ["default", "two"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hra_u" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def picture(model: nn.Module, folder: Path) -> str:
    return hra_fx.visualize(model, folder / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [None, ["default"]])
def test_a_merged_adapter_is_in_use(names: list[str] | None, tmp_path: Path) -> None:
    model = two_adapters()
    before = picture(model, tmp_path)
    assert "r 6 · d 12" in before
    hra_fx.merge_adapter(model, names)
    assert picture(model, tmp_path) == before


def test_adapters_that_are_off_turn_nothing(tmp_path: Path) -> None:
    model = two_adapters()
    with hra_fx.disable_adapters(model):
        shown = picture(model, tmp_path)
    assert shown.count(">no active adapter<") == 2


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Identity(), nn.Sequential(nn.ReLU())])
def test_a_model_without_parts_that_hold_numbers_is_one_box(model: nn.Module, tmp_path: Path) -> None:
    (data,) = dict(hra_fx.to_networkx(model).nodes(data=True)).values()
    assert (data["name"], data["parameters"]) == (type(model).__name__, sum(p.numel() for p in model.parameters()))
    for ending in ("svg", "html", "mmd", "dot", "graphml"):
        file = hra_fx.visualize(model, tmp_path / f"a.{ending}")
        assert type(model).__name__ in file.read_text(encoding="utf-8")


def test_a_single_adapted_layer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    layer = two_adapters()[0]
    assert [row.path for row in hra_fx.report(layer)] == ["", ""]
    with pytest.raises(VisualizeError, match=r"`model` is a single adapted layer \(Linear\).*path as `focus`"):
        hra_fx.visualize(layer, tmp_path / "a.svg")


def test_inputs_that_do_not_fit_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(HRAWarning, match=r"The graph does not run on `example_inputs` .*no shapes"):
        hra_fx.visualize(two_adapters(), tmp_path / "a.svg", example_inputs=torch.zeros(2, 5))


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
