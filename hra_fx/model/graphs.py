"""Graphs of models that have adapters: for `hra_fx.graphs`, and for pictures."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import fx, nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.target import find_kind
from hra_fx.model.state import adapted_layers, base_model_view, require_adapted_layers, unwrap
from hra_fx.passes.graph import graph_module
from hra_fx.passes.insert import insert
from hra_fx.passes.match import match
from hra_fx.passes.trace import trace


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
    return {"": graph_of(unwrap(model), example_inputs)}


def graph_of(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Trace an adapted model, with the reflections. For a `GraphModule`, the result is a copy of its graph.

    With example inputs, the result is the graph of this call, captured with `torch.export` if necessary.
    """
    if isinstance(model, fx.GraphModule):  # its own graph has the reflections
        return graph_module(model, copy.deepcopy(model.graph), {})
    with base_model_view(model):
        made = trace(model, adapted_layers(model).values(), example_inputs)
    return insert(made, match(made))


def drawn_graph(model: nn.Module, example_inputs: Any) -> fx.GraphModule | None:
    """Trace a model, adapted or not, for a picture: faster than `graph_of`, and valid for this call in eval mode.

    `None` if the model cannot be traced.
    """
    if isinstance(model, fx.GraphModule):
        return graph_of(model)
    layers: list[nn.Module] = [*adapted_layers(model).values()]
    layers = layers or [part for part in model.modules() if find_kind(part)]
    if example_inputs is None and (not layers or model in layers):  # one box
        return None
    try:
        with base_model_view(model):
            made = trace(model, layers, example_inputs, only=True)
    except AdapterError as error:
        if example_inputs is not None:
            warnings.warn(f"The picture has no data flow: {error}", HRAWarning, stacklevel=2)
        return None
    return insert(made, match(made))
