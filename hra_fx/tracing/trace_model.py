"""One GraphModule for a whole model: by torch.fx, or from an example call by torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from hra_fx.errors import AdapterError, CaptureError
from hra_fx.model.example_inputs import Call, example_call, normalize_inputs
from hra_fx.tracing.capture_layers import capture_layers
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.trace import trace


def is_graph_of_call(model: nn.Module, graph: fx.Graph, call: Call) -> bool:
    """Whether a graph of torch.fx is that of a call; optional arguments have their defaults in the graph.

    Args:
        model: the model; the graph of a `GraphModule` is its own, with all arguments.
        graph: the graph of the whole model.
        call: the call.

    Example:
        >>> import torch
        >>> model = nn.Linear(6, 8)
        >>> is_graph_of_call(model, trace(model, []).graph, ((torch.ones(1, 6),), {}))
        True
    """
    if isinstance(model, fx.GraphModule):
        return True
    args, kwargs = call
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    try:
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    except TypeError:
        return False
    return list(given)[1:] == names


def trace_model(
    model: nn.Module, layers: Collection[nn.Module], example_inputs: Any = None, dynamic_shapes: Any = None
) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters, for train and eval mode.

    Args:
        model: a plain model; it is not changed.
        layers: layers that must stay calls.
        example_inputs: one tensor, a tuple of positional or a dictionary of keyword arguments. Where torch.fx cannot
            trace the model, or the call gives optional arguments, `torch.export` captures this call. By default the
            call is made from the model's configuration.
        dynamic_shapes: see `capture_layers`; with it, `torch.export` is used.

    Returns:
        A graph that calls layers.

    Raises:
        AdapterError: the model cannot be traced; or `torch.export` is needed, and `example_inputs` is missing.

    Example:
        >>> model = trace_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), [])
        >>> [node.op for node in model.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    reason = ""
    if dynamic_shapes is None:
        try:
            traced = trace(model, layers)
            if call is None or is_graph_of_call(model, traced.graph, call):
                return graph_module(model, traced)
        except CaptureError as error:
            reason = f"torch.fx cannot trace {type(model).__name__}: {error.reason}. "
    call = call or example_call(model)
    if call is None:
        raise AdapterError(
            f"{reason}Pass example_inputs, the arguments of one call, for torch.export to capture, or leave out "
            "trace=True."
        )
    try:
        return capture_layers(model, call, dynamic_shapes)
    except CaptureError as error:
        raise AdapterError(
            f"torch.export cannot capture {type(model).__name__}: {error.reason}. Leave out trace=True: the adapted "
            "layers work without a graph."
        ) from error
