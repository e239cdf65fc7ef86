"""absorb: reflections that their layer makes up for are gone from graphs that run, and from no others."""

from __future__ import annotations

from typing import Any

import torch
from one_layer import normal
from oracles import dense_q, relative_error
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.layers.target import META, Site
from passes.absorb import AbsorbPass
from passes.insert import InsertPass
from passes.match import MatchPass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.shared = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(self.shared(x) + self.shared(x * 2))


PATHS = {"conv": "conv2d", "shared": "linear", "head": "linear"}


def inserted() -> fx.GraphModule:
    model: Any = Net()
    for path in PATHS:
        model.get_submodule(path).add_module("hra_u", nn.Identity())
    graph: fx.GraphModule = fx.symbolic_trace(model)
    MatchPass({path: Site(path, kind) for path, kind in PATHS.items()})(graph)  # type: ignore[arg-type]
    InsertPass()(graph)
    return graph


def reflections(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).endswith(".hra_u")]


def test_all_are_gone_and_their_layers_are_called_alone() -> None:
    graph = inserted()
    assert reflections(graph.graph) == ["conv.hra_u", "shared.hra_u", "shared.hra_u", "head.hra_u"]
    before = len(graph.graph.nodes)
    assert AbsorbPass()(graph).modified
    assert reflections(graph.graph) == []
    assert len(graph.graph.nodes) == before - 4
    for node in graph.graph.nodes:
        if node.target in PATHS:
            assert len(node.args) == 1
            assert node.meta[META].role == "layer"
    assert not AbsorbPass()(graph).modified


def test_a_reflection_that_somebody_else_reads_stays() -> None:
    graph = inserted()
    reflection = next(node for node in graph.graph.nodes if node.target == "head.hra_u")
    (output,) = graph.graph.find_nodes(op="output")
    output.args = ((output.args[0], reflection),)
    AbsorbPass()(graph)
    assert reflections(graph.graph) == ["head.hra_u"]


def test_a_model_that_runs_is_right_and_shows_its_reflections() -> None:
    model = Net().double()
    base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    adapted: Any = hra_fx.transform(model, hra_fx.HRAConfig(r=3, target_modules=["conv", "shared", "head"]))
    for seed, (name, vectors) in enumerate(adapted.named_parameters()):
        if ".hra_u." in name:
            vectors.data.copy_(normal(seed, *vectors.shape))
    x = normal(9, 4, 2, 4, 4)
    turned = {
        path: base[f"{path}.weight"].flatten(1) @ dense_q(box["default"].detach(), anchor=box.anchor("default"))
        for path in PATHS
        for box in [adapted.get_submodule(path).hra_u]
    }
    hidden = nn.functional.conv2d(x, turned["conv"].view_as(base["conv.weight"]), base["conv.bias"]).relu().flatten(1)
    hidden = sum(nn.functional.linear(part, turned["shared"], base["shared.bias"]) for part in (hidden, hidden * 2))
    wanted = nn.functional.linear(hidden, turned["head"], base["head.bias"])
    assert relative_error(adapted(x), wanted) < 1e-12
    shown = hra_fx.graphs(adapted)[""].graph
    assert reflections(shown) == ["conv.hra_u", "shared.hra_u", "shared.hra_u", "head.hra_u"]
