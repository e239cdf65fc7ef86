"""A model of three adapted layers, and its output by dense products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from one_layer import F64, normal
from oracles import dense_q
from torch import Tensor, nn

import hra_fx

X = normal(1, 4, 12)


class Net(nn.Module):
    """Three layers, two of one width."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12, dtype=dtype), nn.Linear(12, 7, dtype=dtype)
        self.three = nn.Linear(7, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def adapted(make: Callable[[], nn.Module] = Net, *, r: int = 3, dtype: torch.dtype = F64, **settings: Any) -> Any:
    config = hra_fx.HRAConfig(r=r, target_modules="all-linear", exclude_modules=[], **settings)
    model: Any = hra_fx.transform(make().to(dtype), config)
    for seed, layer in enumerate((model.one, model.two, model.three)):
        with torch.no_grad():
            layer.hra_u["default"].copy_(normal(seed, *layer.hra_u["default"].shape))
    return model


def vectors_of(model: Any) -> list[nn.Parameter]:
    return [layer.hra_u["default"] for layer in (model.one, model.two, model.three)]


def wanted(model: Any, x: Tensor, *, apply_GS: bool = False) -> Tensor:
    for layer in (model.one, model.two, model.three):
        box = layer.hra_u
        weight = layer.hra_base.double() @ dense_q(box["default"], apply_GS=apply_GS, anchor=box.anchor("default"))
        x = nn.functional.linear(x, weight, layer.bias.double())
        x = x if layer is model.three else torch.tanh(x)
    return x
