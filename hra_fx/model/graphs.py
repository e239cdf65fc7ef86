"""Graphs that call adapted layers: trace one from a model, or insert reflections into a `fx.GraphModule` in place.

The first node of a `GraphModule` with adapters computes the factors of all layers in batches:

    f = hra_factors();  ...;  h = layer.hra_u(x, f);  y = layer(h, reflected=True)

The forward of an adapted model does the same before it calls the forward of its class. The class of a `GraphModule` is
not changed, because fx creates a separate class for each copy.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.batch import start
from hra_fx.layers.running import Run
from hra_fx.layers.target import FACTORS, find_kind
from hra_fx.model.state import adapted_layers, base_model_view, require_adapted_layers, unwrap
from hra_fx.passes.fold import erase
from hra_fx.passes.graph import UnpicklingTracer, graph_module
from hra_fx.passes.insert import insert
from hra_fx.passes.match import match
from hra_fx.passes.trace import trace
from hra_fx.selection.origin import GraphPart


def graphs(model: nn.Module, example_inputs: Any = None) -> dict[str, fx.GraphModule]:
    """Trace a transformed model into a graph that calls its layers, with a node for each reflection.

    torch.fx traces the model. If it cannot, or if `example_inputs` pass optional arguments, `torch.export` captures
    this call, as in graph mode. The graph then takes the arguments of this call. Sizes may change if the model allows
    it. The graph returns the model's outputs, with `None` instead of objects that `torch.export` does not support, such
    as a cache.

    Args:
        model: a transformed model.
        example_inputs: a tuple of positional arguments, a dictionary of keyword arguments, or one tensor.

    Returns:
        `""` -> the graph of the whole model, with the model's own modules and parameters. Changing the graph does not
        change the model.

    Raises:
        AdapterError: the model has no reflections, or cannot be traced. The adapted layers work without a graph.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [node.target for node in graphs(model)[""].graph.nodes if node.op == "call_module"]
        ['0.hra_u', '0', '1']
    """
    require_adapted_layers(model)
    inner = unwrap(model)
    return {"": _trace(inner, [*adapted_layers(inner).values()], example_inputs)}


def drawn_graph(model: nn.Module, example_inputs: Any) -> fx.GraphModule | None:
    """Trace a model, adapted or not, for a picture: faster than `graphs`, and valid for this call in eval mode.

    `None` if the model cannot be traced.
    """
    layers: list[nn.Module] = [*adapted_layers(model).values()]
    layers = layers or [part for part in model.modules() if find_kind(part)]
    is_graph = isinstance(model, fx.GraphModule)
    if not is_graph and example_inputs is None and (not layers or model in layers):  # one box
        return None
    try:
        return _trace(model, layers, example_inputs, only=True)
    except AdapterError as error:
        if example_inputs is not None:
            warnings.warn(f"The picture has no data flow: {error}", HRAWarning, stacklevel=2)
        return None


def _trace(model: nn.Module, layers: list[nn.Module], example_inputs: Any, *, only: bool = False) -> fx.GraphModule:
    """Trace a model with the reflections. For a `GraphModule`, the result is a copy of its graph."""
    if isinstance(model, fx.GraphModule):  # its own graph has the reflections
        return graph_module(model, copy.deepcopy(model.graph), {})
    with base_model_view(model):
        made = trace(model, layers, example_inputs, only=only)
    return insert(made, match(made))


class BatchedFactors(GraphPart):
    """Computes the factors of all layers of a graph. It does not have parameters or children."""

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
