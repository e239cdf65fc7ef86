"""`hra_fx.graphs`: the graph of a whole model or of the largest parts that fx can trace, over shared parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import adapted, picture
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


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.a(x)) if mask is None else self.b(self.a(x) * mask)


class Host(nn.Module):
    """It branches on a value; its parts are of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.gate = nn.Linear(4, 4)
        self.one = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.optional = Optional()
        self.graph = fx.symbolic_trace(mlp())
        self.patched = mlp()
        self.patched.forward = self.patched.forward  # type: ignore[method-assign]
        self.shared = self.gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x) if x.sum() > 0 else self.gate(x)
        return self.shared(self.patched(self.graph(self.optional(self.one(x), mask=x))))


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


def test_the_largest_parts() -> None:
    model = adapted(Host().double(), target_modules=r"(.*\.)?(0|2|a|b|gate)")
    before = picture(model)
    graphs, x = hra_fx.graphs(model), normal(2, 3, 4)
    assert picture(model) == before
    alone = {"gate", "one.0", "optional.a", "optional.b", "graph.0", "graph.2", "patched.0", "patched.2"}
    assert set(graphs) == {"mlp", *alone}
    assert targets_of(graphs["mlp"]) == ["0.hra_u", "0", "1", "2.hra_u", "2"]
    assert targets_of(graphs["gate"]) == ["gate.hra_u", "gate"]
    for path in ("mlp", "gate"):
        assert_same(graphs[path](x), model.get_submodule(path)(x))


@pytest.mark.needs("torch>=2.9")
def test_interpreters_and_export() -> None:
    model = net().eval()
    graph = hra_fx.graphs(model)[""]
    assert_same(fx.Interpreter(graph).run(IMAGE), model(IMAGE))
    assert_same(torch.export.export(graph, (IMAGE,)).module()(IMAGE), model(IMAGE))


def test_a_plain_model_has_no_graphs() -> None:
    with pytest.raises(AdapterError, match=r"Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.graphs(Net())
