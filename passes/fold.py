"""fold: write `W Q` into the weights, and remove the reflections, so that the graph is that of the base model.

h = layer.hra_u(x);  y = layer(h, reflected=True)    becomes    y = layer(x),  with  W <- W Q
"""

from __future__ import annotations

import torch
from torch import fx, nn

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import FACTORS, REFLECTION, held_weight, weight_entry
from hra_fx.passes.reflection import REFLECTED


def fold(graph_module: fx.GraphModule, *, child: str = REFLECTION) -> fx.GraphModule:
    """Fold the adapter of each layer into its weight, in place, and remove it from the layer and from the graph.

    The result is the graph before `insert`, node for node. For adapters of `transform`, `hra_fx.fold` does the same: it
    checks all weights first, computes in float64, and may keep some of them.

    Args:
        graph_module: a graph that calls layers with an adapter.
        child: the name of the adapter in its layer. Without this child, the layer must compute `W x`.

    Raises:
        GraphInvariantError: `transform` added the adapters, or a node is between a layer and its reflection.
    """
    check_reflections(graph_module, child=child)
    if FACTORS in graph_module._modules:
        raise GraphInvariantError("hra_fx.transform added the adapters of this graph. Call hra_fx.fold(graph).")
    for layer in [layer for layer in graph_module.modules() if child in layer._modules]:
        weight, reflection = held_weight(layer), layer._modules[child]
        assert weight is not None and reflection is not None
        with torch.no_grad():
            weight.copy_(reflection(weight=weight))
        del layer._modules[child]
    return erase(graph_module, child=child)


def erase(graph_module: fx.GraphModule, *, child: str = REFLECTION) -> fx.GraphModule:
    """Undo `insert`, in place, and recompile the graph. The layers keep their adapters, and reflect by themselves."""
    check_reflections(graph_module, child=child)
    graph = graph_module.graph
    # In reverse order, so that a reflection of an input does not have readers when it is erased.
    for node in reversed(graph.find_nodes(op="call_module")):
        path, _, name = str(node.target).rpartition(".")
        if name == child:
            _remove(node, path, graph_module.get_submodule(path))
        elif node.target == FACTORS:
            graph.erase_node(node)
        elif isinstance(experts := graph_module.get_submodule(str(node.target)), ExpertsWeight):
            node.op, node.target = "get_attr", weight_entry(str(node.target), experts)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _remove(reflection: fx.Node, path: str, layer: nn.Module) -> None:
    if isinstance(base := reflection.kwargs.get("weight"), fx.Node):
        base.target = weight_entry(path, layer)
        reflection.replace_all_uses_with(base)
    for call in [*reflection.users]:
        call.kwargs = {name: value for name, value in call.kwargs.items() if name != REFLECTED}
        call.replace_input_with(reflection, reflection.all_input_nodes[0])
    reflection.graph.erase_node(reflection)


def check_reflections(graph_module: fx.GraphModule, *, child: str = REFLECTION) -> None:
    """Raise a `GraphInvariantError` if a node between the reflection of an input and its layer uses this reflection.

    Without the reflection, this node would get another value.
    """
    for node in graph_module.graph.find_nodes(op="call_module"):
        path, _, name = str(node.target).rpartition(".")
        users = node.users if name == child and "weight" not in node.kwargs else ()
        other = next((user for user in users if user.target != path), None)
        if node.kwargs.get(REFLECTED) is True and str(node.all_input_nodes[0].target) != f"{node.target}.{child}":
            path, other = str(node.target), node.all_input_nodes[0]
        if other is not None:
            raise GraphInvariantError(
                f"{path}: node {other.name!r} is between the layer and the reflection of its input, so this reflection "
                "cannot be removed or replaced. Remove the node first."
            )
