"""What a graph cannot contain, and models of diffusers, whose modes differ in `contiguous`."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from layers.checking import assert_same, normal, tensors
from torch import Tensor, nn
from tracing.models import Two
from zoo.models import entries

import hra_fx
from hra_fx.errors import AdapterError

pytestmark = pytest.mark.needs("torch>=2.9")

X = normal(1, 4, 6)
LAYERS = hra_fx.HRAConfig(r=2, target_modules="all-linear")


def captured(model: nn.Module, example: Any) -> Any:
    return hra_fx.transform(copy.deepcopy(model), LAYERS, trace=True, example_inputs=example)


class Noisy(Two):
    """It adds noise in train mode only."""

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + torch.rand_like(hidden) if self.training else hidden


class Counts(Two):
    """It branches on a value, as BART's classifier does for its end tokens."""

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden.clamp(-1, 1) if (hidden.abs() > 100).any() else hidden


class Detached(Two):
    """It computes without gradients."""

    def middle(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            scale = hidden.abs().mean()
        return hidden * scale


class Conditional(Two):
    def middle(self, hidden: Tensor) -> Any:
        return torch.cond(hidden.sum() > 0, lambda value: value * 2, lambda value: value + 1, (hidden,))


LINE = r"at \w+\.py, line \d+, `.*`"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Noisy, f"it runs different operations in train mode and in eval mode {LINE}"),
        (Counts, f"torch.export fails {LINE} .*data-dependent"),
        (Detached, f"it runs a block under torch.no_grad or torch.enable_grad {LINE}"),
        (Conditional, f"it runs a block under torch.cond {LINE}"),
    ],
)
def test_what_a_graph_cannot_contain_is_refused_with_its_line(make: type[nn.Module], reason: str) -> None:
    with pytest.raises(AdapterError, match=rf"torch\.export cannot capture {make.__name__}: {reason}.*trace=True"):
        captured(make().double(), X)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL"])
def test_models_of_diffusers_are_graphs_of_all_their_layers(name: str) -> None:
    entry = entries()[f"diffusers/{name}"]
    torch.manual_seed(0)
    model = entry.build()
    args, kwargs = entry.call(2, 0)
    call = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    graph = captured(model, call)
    layers = {path for path, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    assert layers <= {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    for training in (True, False):
        wanted, found = (tensors(seeded(module.train(training), call)) for module in (model, graph))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def seeded(module: nn.Module, call: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return module(**call)


class Chosen(nn.Module):
    """It looks up a size or a dtype."""

    def __init__(self, by_size: bool) -> None:
        super().__init__()
        self.first, self.by_size = nn.Linear(6, 6), by_size

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.by_size:
            return hidden * 3 if x.shape[0] in {2, 4} else hidden
        return hidden * {torch.float64: 2.0}.get(x.dtype, 1.0)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_lookup_of_a_value_is_not_a_constant(by_size: bool) -> None:
    model = Chosen(by_size).double()
    with pytest.raises(AdapterError, match="looks up a value in a set or dictionary"):
        hra_fx.transform(copy.deepcopy(model), LAYERS, trace=True)
    if by_size:
        with pytest.raises(AdapterError, match="unhashable type"):
            captured(model, X)
    else:
        eager = hra_fx.transform(copy.deepcopy(model), LAYERS)
        assert_same(captured(model, X)(X), eager(X))
