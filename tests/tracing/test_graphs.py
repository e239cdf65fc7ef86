"""`hra_fx.graphs`: one graph that computes what the adapted model does, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import adapted, picture
from graph_modules import targets_of
from layers.checking import assert_same, normal
from torch import Tensor, fx, nn
from tracing.captured import run
from tracing.models import Images

import hra_fx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.conv(x))), 0.5, self.training)
        return self.head(self.drop(x.mean((2, 3))))


IMAGE = normal(1, 2, 2, 3, 3)
LAYERS = {"conv": 1, "attention": 1, "attention.out_proj": 1, "head": 2}


def images(**fields: Any) -> Any:
    torch.manual_seed(1)
    return adapted(Images().double().eval(), "conv", "attention", "attention.out_proj", "head", **fields)


def check_graph(model: nn.Module) -> fx.GraphModule:
    """The graph computes what the model does, with the same gradients and parameters."""
    found = hra_fx.graphs(model, {"x": IMAGE, "scale": 2.0})
    assert list(found) == [""]
    graph = found[""]
    wanted, given = (run(each, {"x": IMAGE, "scale": 2.0}) for each in (model, graph))
    assert wanted.keys() == given.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(given[name], value, rtol=1e-9, atol=1e-9)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shared = dict(graph.named_parameters()) | dict(graph.named_buffers())
    assert all(own[name] is tensor for name, tensor in shared.items() if name in own)
    assert {name for name, _ in model.named_parameters()} <= shared.keys()
    graph.graph.lint()
    return graph


@pytest.mark.parametrize("fields", [{"r": 3}, {"apply_GS": True, "inference_mode": True}], ids=str)
def test_each_use_of_a_layer_has_a_reflection(fields: dict[str, Any]) -> None:
    graph = check_graph(images(**fields))
    called = [target for target in targets_of(graph) if target.endswith(".hra_u")]
    assert Counter(target.removesuffix(".hra_u") for target in called) == LAYERS


def test_a_model_that_torch_fx_traces() -> None:
    model = adapted(Net().double(), "conv", "head")
    before = picture(model)
    graph = hra_fx.graphs(model)[""]
    assert picture(model) == before
    assert type(graph).__name__ == "Net"
    assert targets_of(graph) == ["conv.hra_u", "conv", "norm", "by_mode_0", "drop", "head.hra_u", "head"]
    nodes = {str(node.target): node for node in graph.graph.nodes}
    assert nodes["conv.hra_u"].meta["nn_module_stack"] == nodes["conv"].meta["nn_module_stack"]
    model.eval()
    graph.eval()
    assert_same(fx.Interpreter(graph).run(IMAGE), model(IMAGE))
    assert_same(torch.export.export(graph, (IMAGE,)).module()(IMAGE), model(IMAGE))
