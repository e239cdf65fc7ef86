"""`graphs`: fx graphs of a model, made when asked for: for pictures, exporters and further passes."""

from __future__ import annotations

import keyword
from typing import Any

from torch import fx, nn

from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import META, NodeTag, find_kind
from hra_fx.model.example_inputs import normalize_inputs
from hra_fx.model.graph_module import insert
from hra_fx.model.state import require_adapted_layers
from hra_fx.tracing.capture import capture
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.trace import Traced
from hra_fx.tracing.whole import whole_graphs
from passes.insert import InsertPass


def graphs(model: nn.Module, example_inputs: Any = None) -> dict[str, fx.GraphModule]:
    """Trace a transformed model with torch.fx, and insert the reflections of its adapted layers into the graphs.

    Without example inputs these are the graph of the whole model, or of the largest parts that fx can trace; they are
    valid in train and eval mode. With them they are whole graphs: that of a model which fx traces whole, else what
    TorchDynamo makes of one call, with each reflection as one node (a function of `hra_fx.layers`) that has a
    `NodeTag` in `meta["hra"]`.

    A whole graph of TorchDynamo takes the tensors of `example_inputs` in the order in which they stand there, and
    returns a tuple of those that the model returns; it is valid for inputs of these shapes, for the mode that the model
    is in, and for the grad mode and autocast of the moment. The call is only traced, not run. If it has graph breaks,
    it is run once, on a copy that shares the parameters; its pieces then take and return what TorchDynamo passes from
    one to the next.

    Args:
        model: a transformed model.
        example_inputs: a tuple of positional arguments, a dictionary of keyword arguments, or one tensor.

    Returns:
        Without example inputs: module path -> GraphModule over the model's own modules and parameters; the key is `""`
        for a model that is traced whole, and the layer's path for a layer in no graph. With them: `""` -> the whole
        graph, or `"call[0]"`, `"call[1]"`, ... -> its pieces in the order in which they run; the `get_attr` nodes of
        TorchDynamo's have the names of the model's parameters and buffers, which they share. Changing a graph does not
        change the model.

    Raises:
        AdapterError: the model has no reflections, or does not run on the inputs; or TorchDynamo cannot record the
            call.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [node.target for node in graphs(model)[""].graph.nodes if node.op == "call_module"]
        ['0.hra_u', '0', '1']
    """
    sites = require_adapted_layers(model)
    captured = capture(model, sites)
    if example_inputs is not None and list(captured.parts) != [""]:
        return whole_graphs(model, normalize_inputs(example_inputs))
    found = {path: _adapted(model, path, traced) for path, traced in captured.parts.items()}
    found |= {path: _alone(path, sites[path]) for path, root in captured.roots.items() if root is None}
    return dict(sorted(found.items()))


def plain_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graph of a model without adapters, or of the largest parts that fx can trace.

    Args:
        model: any module; it is not changed.

    Returns:
        Module path -> GraphModule over the model's own modules and parameters.

    Example:
        >>> list(plain_graphs(nn.Sequential(nn.Linear(6, 8), nn.ReLU())))
        ['']
    """
    layers = {path: part for path, part in model.named_modules() if find_kind(part) is not None}
    parts = capture(model, layers).parts
    return {path: graph_module(model.get_submodule(path), traced) for path, traced in parts.items()}


def _adapted(model: nn.Module, path: str, traced: Traced) -> fx.GraphModule:
    """The graph of a part with its reflections."""
    root = model.get_submodule(path)
    module = graph_module(root, traced)
    insert(module, model, path)
    return module


def _alone(path: str, layer: AdaptedLayer) -> fx.GraphModule:
    """A graph of the one call, or of the weight that others read; its root holds the layer under its own name."""
    name = path.rpartition(".")[2]
    name = "layer" if keyword.iskeyword(name) else name
    root = nn.Module()
    root.add_module(name, layer)
    graph = fx.Graph()
    if layer.hra_u.is_called:
        marked = graph.call_module(name, (graph.placeholder("input"),))
    else:
        marked = graph.get_attr(f"{name}.{layer.hra_u.weight_name}")
    graph.output(marked)
    marked.meta[META] = NodeTag(path, layer.hra_u.kind, "layer" if layer.hra_u.is_called else "weight")
    module = graph_module(root, Traced(graph, {}))
    InsertPass()(module)
    module.train(layer.training)
    return module
