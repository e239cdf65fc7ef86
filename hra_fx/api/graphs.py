"""`graphs`: trace a transformed model into fx graphs, for pictures, exporters and other passes."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from hra_fx.model.state import require_adapted_layers
from hra_fx.tracing.graphs import graphs_of


def graphs(model: nn.Module, example_inputs: Any = None) -> dict[str, fx.GraphModule]:
    """Trace a transformed model, with the reflections of its adapted layers in the graphs.

    Without example inputs, torch.fx traces the whole model, or the largest parts that it can trace. With example inputs
    the result is always one graph, as in graph mode: if torch.fx cannot trace the whole model, or if the call passes
    optional arguments, `torch.export` captures the call.

    All graphs call the layers of the model, and have a node for each reflection. With example inputs, the graph takes
    the arguments of this call. Sizes may change if the model allows it. The graph returns the model's outputs, with
    `None` instead of objects that `torch.export` does not support, such as a cache.

    Args:
        model: a transformed model.
        example_inputs: a tuple of positional arguments, a dictionary of keyword arguments, or one tensor.

    Returns:
        Without example inputs: module path -> GraphModule with the model's own modules and parameters. The key is `""`
        if the whole model was traced. A layer that is not part of another graph has a graph under its own path. With
        example inputs: `""` -> the graph of the whole model, with the model's own parameters. Changing a graph does not
        change the model.

    Raises:
        AdapterError: the model has no reflections, or `torch.export` cannot capture the call.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> [node.target for node in graphs(model)[""].graph.nodes if node.op == "call_module"]
        ['0.hra_u', '0', '1']
    """
    require_adapted_layers(model)
    return graphs_of(model, example_inputs)
