"""The first node of a graph with adapters: it computes the factors of all layers in batches.

    f = hra_factors();  ...;  h = layer.hra_u(x, f);  y = layer(x, h)

The forward of an adapted model does the same before it calls that of its class; the class of a `GraphModule` is not
swapped, because fx gives each copy a class of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import fx, nn

from hra_fx.compat import is_exporting, is_replica
from hra_fx.kernels.dispatch import is_plain_eager
from hra_fx.layers.batching import StartOfForward, start_of_forward
from hra_fx.layers.mixed import CURRENT
from hra_fx.layers.target import FACTORS
from hra_fx.model.state import get_state


class BatchedFactors(nn.Module):
    """Computes the factors of all layers of a graph; it has no parameters, and no children."""

    def __init__(self) -> None:
        """Know no layers yet."""
        super().__init__()
        self.state: Any = None

    def forward(self) -> StartOfForward | None:
        """The factors; `None` if each layer is to compute its own: under torch.compile, for example."""
        if self.state is None or self.state.disabled or is_replica(self) or is_exporting() or not is_plain_eager():
            return None
        if not self.state.active and CURRENT.batch is None:
            return None
        return start_of_forward(self.state.layers)


def add_factors(module: fx.GraphModule, undo: ExitStack | None = None) -> None:
    """Add the child that computes the factors."""
    if FACTORS not in module._modules:
        module.add_module(FACTORS, BatchedFactors())
        if undo is not None:
            undo.callback(module._modules.pop, FACTORS, None)


def connect_factors(module: nn.Module) -> None:
    """Let the child know the state of the model, which must be attached."""
    factors = module._modules.get(FACTORS)
    if isinstance(factors, BatchedFactors):
        factors.state = get_state(module)
