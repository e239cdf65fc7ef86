"""Models that fx cannot trace, which read weights or only ask about them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from layers.checking import normal, randomise
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import hra_fx
from hra_fx.overlooked import WeightWatch

X = normal(3, 4, 6)


CONFIG = hra_fx.HRAConfig(r=3, target_modules=["first", "second"])


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """A helper outside of every module."""
    return x @ weight.mT


class Reader(nn.Module):
    """A module that gets a layer at its call."""

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return nn.functional.linear(x, given.weight)


class Untraceable(nn.Module):
    """Two layers 6 -> 6, of which `extra` makes something more; fx does not get by the `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.reader = Reader()
        self.modes = 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        self.modes += bool(watching())
        return self.extra(self.second(torch.tanh(self.first(x))))

    def extra(self, x: Tensor) -> Tensor:
        return x


def watching() -> int:
    return sum(isinstance(mode, WeightWatch) for mode in _get_current_function_mode_stack())


class Alias(Untraceable):
    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        return nn.functional.linear(x, layer.weight)


def adapted(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    """A base model, and a transformed copy with random vectors."""
    base = model.double()
    torch.manual_seed(0)
    twin = hra_fx.transform(copy.deepcopy(base), CONFIG, **options)
    randomise(twin)
    return base, twin


class Asking(Untraceable):
    """Asks weights what they are, and makes others like them."""

    def extra(self, x: Tensor) -> Tensor:
        layer = self.first
        weight = layer.weight
        if weight.is_cuda or (weight.requires_grad and weight.device.type == "meta"):
            return x
        assert weight.shape[0] == weight.size(1) == 6 and weight.numel() == 36 and weight.dim() == weight.ndim == 2
        assert weight.is_floating_point() and weight.stride() == (6, 1) and weight.is_contiguous()
        same = x.to(weight).type_as(weight).to(weight.device) + weight.new_zeros(1) + torch.zeros_like(weight).sum()
        return same + torch.empty_like(layer.weight, dtype=torch.int8).numel() * 0.0
