"""`hra_fx.graphs`: the graph of a whole model, over shared parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import adapted
from graph_modules import targets_of
from layers.checking import assert_same, normal
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.errors import AdapterError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.conv(x))), 0.5, self.training)
        return self.head(self.drop(x.mean((2, 3))))


def net() -> Any:
    torch.manual_seed(0)
    return adapted(Net().double(), "conv", "head")


IMAGE = normal(1, 2, 3, 5, 5)


def test_a_model_that_is_traced_whole() -> None:
    model = net()
    found = hra_fx.graphs(model)
    assert list(found) == [""] and isinstance(found[""], fx.GraphModule) and type(found[""]).__name__ == "Net"
    assert targets_of(found[""]) == ["conv.hra_u", "conv", "norm", "by_mode_0", "drop", "head.hra_u", "head"]
    nodes = {str(node.target): node for node in found[""].graph.nodes}
    assert nodes["conv.hra_u"].meta["nn_module_stack"] == nodes["conv"].meta["nn_module_stack"]


@pytest.mark.needs("torch>=2.9")
def test_interpreters_and_export() -> None:
    model = net().eval()
    graph = hra_fx.graphs(model)[""]
    assert_same(fx.Interpreter(graph).run(IMAGE), model(IMAGE))
    assert_same(torch.export.export(graph, (IMAGE,)).module()(IMAGE), model(IMAGE))


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_needs_an_example() -> None:
    with pytest.raises(AdapterError, match=r"torch\.fx cannot trace Branches: it branches on a value.*example_inputs"):
        hra_fx.graphs(adapted(Branches(), "head"))


def test_a_plain_model_has_no_graphs() -> None:
    with pytest.raises(AdapterError, match=r"Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.graphs(Net())
