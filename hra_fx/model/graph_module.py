"""A `fx.GraphModule` that calls adapted layers: insert their reflections into its graph, in place, and remove them.

Its first node computes the factors of all layers in batches:

    f = hra_factors();  ...;  h = layer.hra_u(x, f);  y = layer(x, h)

The forward of an adapted model does the same before it calls the forward of its class. The class of a `GraphModule` is
not changed, because fx creates a separate class for each copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from hra_fx.layers.batch import start
from hra_fx.layers.running import Run
from hra_fx.layers.target import FACTORS
from hra_fx.passes.fold import erase
from hra_fx.passes.graph import UnpicklingTracer
from hra_fx.passes.insert import insert
from hra_fx.passes.match import match


class BatchedFactors(nn.Module):
    """Computes the factors of all layers of a graph. It does not have parameters or children."""

    # fx keeps a call without users for such modules. The child holds the state of the model.
    _is_impure = True

    #: The state of the model, from `attach_state`.
    state: Any = None

    def forward(self) -> Run | None:
        """Return the factors, or `None` if each layer computes its own, for example under torch.compile."""
        if self.state is None or self.state.disabled or not self.state.active:
            return None
        if torch.compiler.is_compiling():
            return None
        return start(self, lambda: self.state.layers)


def rewrite(module: fx.GraphModule) -> None:
    """Insert the reflections of all adapted layers into the graph, instead of the ones that it has."""
    before, is_new = module.graph, FACTORS not in module._modules
    graph = copy.deepcopy(before)
    vars(module)["_tracer_cls"] = graph._tracer_cls = UnpicklingTracer
    try:
        module.graph = graph
        erase(module)
        if is_new:
            module.add_module(FACTORS, BatchedFactors())
        insert(module, match(module))
    except BaseException:
        module.graph = before
        if is_new:
            module._modules.pop(FACTORS, None)
        raise
