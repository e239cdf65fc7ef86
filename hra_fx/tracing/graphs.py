"""Create graphs of a whole model or of its parts, with torch.fx, or with torch.export from an example call."""

from __future__ import annotations

import copy
import inspect
import keyword
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from hra_fx.errors import AdapterError, CaptureError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import META, NodeTag, find_kind
from hra_fx.model.example_inputs import Call, example_call, normalize_inputs
from hra_fx.model.graph_module import insert, tag_adapted_layers
from hra_fx.model.state import base_model_view, require_adapted_layers
from hra_fx.tracing.capture_layers import capture_layers
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.trace import Traced, capture, trace
from passes.insert import InsertPass


def is_graph_of_call(model: nn.Module, graph: fx.Graph, call: Call) -> bool:
    """Whether a graph of torch.fx is valid for a call. Optional arguments have their defaults in the graph.

    Args:
        model: the model; a `GraphModule` has its own graph, with all arguments.
        graph: the graph of the whole model.
        call: the call.
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
        example_inputs: one tensor, a tuple of positional or a dictionary of keyword arguments. If torch.fx cannot trace
            the model, or if the call passes optional arguments, `torch.export` captures this call. By default, the
            inputs are created from the model's configuration.
        dynamic_shapes: see `capture_layers`; with it, `torch.export` is used.

    Returns:
        A graph that calls layers.

    Raises:
        AdapterError: the model cannot be traced; or `torch.export` is needed, but `example_inputs` is missing.
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
            f"{reason}Pass example_inputs, the arguments of one call, so that torch.export can capture it, or leave "
            "out trace=True."
        )
    try:
        return capture_layers(model, call, dynamic_shapes)
    except CaptureError as error:
        raise AdapterError(
            f"torch.export cannot capture {type(model).__name__}: {error.reason}. Leave out trace=True: the adapted "
            "layers work without a graph."
        ) from error


def adapted_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Trace a transformed model, or the largest parts of it that torch.fx can trace, with the reflections.

    Args:
        model: a transformed model; it is not changed.

    Returns:
        Module path -> GraphModule with the model's own modules and parameters. A layer that is not in another graph has
        a graph under its own path. For a `GraphModule`, a copy of its graph.

    Raises:
        AdapterError: the model has no reflections.
    """
    layers = require_adapted_layers(model)
    if isinstance(model, fx.GraphModule):  # its own graph has the reflections
        tag_adapted_layers(model)
        return {"": graph_module(model, Traced(copy.deepcopy(model.graph), {}))}
    captured = capture(model, layers)
    found = {path: _adapted(model, path, traced) for path, traced in captured.parts.items()}
    found |= {path: _alone(path, layers[path]) for path, (root, _) in captured.layers.items() if root is None}
    return dict(sorted(found.items()))


def graph_of_call(model: nn.Module, call: Call) -> fx.GraphModule:
    """Capture one call of a model with `torch.export`. If the model is adapted, the graph has the reflections.

    Args:
        model: the model; it is not changed.
        call: the example call.

    Returns:
        A GraphModule with the model's own modules and parameters, for train and eval mode.

    Raises:
        AdapterError: `torch.export` cannot capture the call.
    """
    try:
        with base_model_view(model):
            module = capture_layers(model, call, is_trained=False)
    except CaptureError as error:
        raise AdapterError(
            f"torch.export cannot capture {type(model).__name__}: {error.reason}. Without example_inputs, "
            "hra_fx.graphs and hra_fx.visualize use torch.fx, and show the parts that it can trace."
        ) from error
    insert(module, model)
    return module


def plain_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Trace a model without adapters, or the largest parts of it that fx can trace.

    Args:
        model: any module; it is not changed.

    Returns:
        Module path -> GraphModule with the model's own modules and parameters.
    """
    layers = {path: part for path, part in model.named_modules() if find_kind(part) is not None}
    parts = capture(model, layers).parts
    return {path: graph_module(model.get_submodule(path), traced) for path, traced in parts.items()}


def _adapted(model: nn.Module, path: str, traced: Traced) -> fx.GraphModule:
    """Create the graph of a part with its reflections."""
    root = model.get_submodule(path)
    module = graph_module(root, traced)
    insert(module, model, path)
    return module


def _alone(path: str, layer: AdaptedLayer) -> fx.GraphModule:
    """Create a graph of a single call, or of the weight that other modules read. The root has the layer as a child."""
    name = path.rpartition(".")[2]
    name = "layer" if keyword.iskeyword(name) else name
    root = nn.Module()
    root.add_module(name, layer)
    graph = fx.Graph()
    if layer.hra_u.reflects_input:
        marked = graph.call_module(name, (graph.placeholder("input"),))
    else:
        marked = graph.get_attr(f"{name}.{layer.hra_u.weight_name}")
    graph.output(marked)
    marked.meta[META] = NodeTag(path, layer.hra_u.kind, "layer" if layer.hra_u.reflects_input else "weight")
    module = graph_module(root, Traced(graph, {}))
    InsertPass()(module)
    module.train(layer.training)
    return module
