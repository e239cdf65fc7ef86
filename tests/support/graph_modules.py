"""Traced models, transformed in their own graph, and what their fold must be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from adapting import randomise
from layers.checking import assert_same, normal
from torch import Tensor, fx, nn

import hra_fx

X = normal(3, 4, 6)
IMAGES = normal(4, 2, 3, 8, 8)


class Mlp(nn.Module):
    """Two layers, both called twice, and a value that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        self.second(x)
        return self.second(torch.relu(self.first(x)) + x)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        hidden = self.drop(torch.relu(self.norm(self.conv(x))))
        return {"out": self.first(self.grouped(hidden).mean(dim=(2, 3))) * gain}


def check_folded(base: Any, model: Any, example: Tensor) -> None:
    """The fold: graph, keys and flags are those of the base model, outputs those from before."""
    before = model(example)
    torch.manual_seed(5)
    assert hra_fx.fold(model) is model
    assert_same(model(example), before, rtol=1e-9)
    assert model.code == base.code and str(model.graph) == str(base.graph)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [(path, type(part)) for path, part in model.named_modules() if path] == [
        (path, type(part)) for path, part in base.named_modules() if path
    ]


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 3, "target_modules": list(targets or ("first", "second"))} | fields))


def traced(make: Callable[[], nn.Module] = Mlp) -> fx.GraphModule:
    torch.manual_seed(0)
    return graph_of(make().double())


def graph_of(model: nn.Module, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    """A graph without the annotations of its nodes, which are strings here, and which fx cannot pickle."""
    module = fx.GraphModule(model, (tracer or fx.Tracer()).trace(model), type(model).__name__)
    for node in module.graph.nodes:
        node.type = None
    module.recompile()
    return module


def adapted(make: Callable[[], nn.Module] = Mlp, *targets: str, **fields: Any) -> tuple[fx.GraphModule, Any]:
    """A traced base model, and a transformed copy with random vectors."""
    base = traced(make)
    model = hra_fx.transform(copy.deepcopy(base), config(*targets, **fields))
    randomise(model)
    return base, model


def targets_of(module: fx.GraphModule) -> list[str]:
    """The modules that a graph calls, without that of the factors."""
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return [target for target in targets if target != "hra_factors"]


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]
