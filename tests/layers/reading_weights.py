"""Adapted layers with their base layers, and models that read weights, for tests of `layer.weight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layers.checking import assert_same, normal, pair, rotated
from torch import Tensor, nn


def layer_pair() -> tuple[Any, Any]:
    """A base layer, and an adapted copy of it."""
    base, model = pair(lambda: nn.ModuleDict({"layer": nn.Linear(6, 4), "other": nn.Linear(2, 2)}), ["layer"])
    return base["layer"], model["layer"]


def dense(base: Any, layer: Any) -> Tensor:
    """`W Q` by explicit matrices in float64, differentiable in the vectors of `layer`."""
    return rotated(base, base.weight.detach(), layer.hra_u)


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


class ReadByAnother(nn.Module):
    """Reads the weight of a layer that it was given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.given = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.given.weight)


def read_by_a_function(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class ReadAtTheCall(nn.Module):
    """Reads the weight of a layer that is an argument of its call."""

    def forward(self, x: Tensor, given: nn.Linear) -> Tensor:
        return F.linear(x, given.weight)


class Reading(nn.Module):
    """Three layers. The weight of `fc` is read in one of the ways in `USES`."""

    def __init__(self, use: str, branches: bool = False) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 6)
        self.after = nn.Linear(6, 4)
        self.at_the_call = ReadAtTheCall()
        if use == "called, and read by another module":
            self.another = ReadByAnother(self.fc)
        self.use, self.branches = use, branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.detach().sum()) > 1e9:  # a branch that cannot be traced
            x = x + 1
        return self.after(USES[self.use](self, torch.tanh(self.before(x))))

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight


def by_metadata(model: Reading, x: Tensor) -> Tensor:
    """Uses dtype, device and shape of the weight, and creates tensors like it."""
    weight = model.fc.weight
    x = x.to(weight.dtype).to(weight.device) + torch.zeros_like(weight).sum() + weight.new_zeros(1)
    return F.linear(x, weight.reshape(weight.shape[0], weight.size(1)))


USES: dict[str, Callable[[Reading, Tensor], Tensor]] = {
    "functional": lambda model, x: F.linear(x, model.fc.weight, model.fc.bias),
    "transposed": lambda model, x: x @ model.fc.weight.T + model.fc.weight.sum(0),
    # Not as the matrix of a product with rows.
    "inside": lambda model, x: x @ torch.softmax(model.fc.weight, -1) @ model.fc.weight,
    "metadata": by_metadata,
    "property": lambda model, x: F.linear(x, model.matrix),
    "called and read": lambda model, x: model.fc(x) + F.linear(2 * x, model.fc.weight),
    "called, and read by another module": lambda model, x: model.fc(x) + model.another(x),
    "called, and given to another module": lambda model, x: model.fc(x) + model.at_the_call(x, model.fc),
}


TARGETS = ("before", "after", "fc")
