"""An adapted layer beside its base, and a model that reads weights functionally, for tests of `layer.weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layers.checking import assert_same, normal, pair, rotation, turned
from torch import Tensor, nn


def linear() -> nn.Module:
    return nn.Linear(6, 4)


def layer_pair(make: Callable[[], nn.Module] = linear, **fields: Any) -> tuple[Any, Any]:
    """A base layer, and the adapted layer over a copy of it."""
    base, model = pair(lambda: nn.ModuleDict({"layer": make(), "other": nn.Linear(2, 2)}), ["layer"], **fields)
    return base["layer"], model["layer"]


def weight_of(layer: Any) -> Any:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def dense(base: Any, layer: Any) -> Tensor:
    """`W Q` by explicit matrices in float64, differentiable in the vectors of `layer`."""
    return turned(base, weight_of(base).detach(), rotation(nn.ModuleDict({"layer": layer}), "layer"))


class Functional(nn.Module):
    """A layer that is called, one that is only read, and one that is both called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)
        return self.both(x) @ torch.softmax(self.both.weight, -1)


X = normal(1, 3, 6)


def functional(**fields: Any) -> tuple[Any, Any]:
    return pair(Functional, ["called", "read", "both"], **fields)


def assert_gradients(output: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """`output` and its gradients equal the oracle's."""
    assert_same(output, wanted)
    mixture = normal(3, *wanted.shape)
    for mine, oracle in zip(
        torch.autograd.grad((output * mixture).sum(), leaves),
        torch.autograd.grad((wanted * mixture).sum(), leaves),
        strict=True,
    ):
        assert float(oracle.abs().max()) > 1e-6
        assert_same(mine, oracle)
