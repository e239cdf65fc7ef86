r"""insert: add a reflection before each call of a layer, and after each read of a weight.

    y = linear(x)                   becomes        h = linear.hra_u(x, f);  y = linear(h, reflected=True)
    y = conv(x)                     becomes        h = conv.hra_u(x, f);  y = conv(x, reflected=h)
    y = f(x, layer.weight)          becomes        w = layer.hra_u(weight=layer.hra_base);  y = f(x, w)
    y = f(x, experts.up)            becomes        w = experts.hra_up();  y = f(x, w)

For a Linear, `h = x Q^T`, and the layer computes `h W^T = x (W Q)^T` from its input `h`, which hooks on the layer get.
For a convolution, `h` contains the factors of its reflections (`hra_fx.layers.conv`). For a weight, `hra_base` is the
base weight, and `w` is `W Q`. The graph is the only record of these changes.

If the graph has the child `hra_factors`, the first node calls it, and `f` is its result for all layers. A graph without
reflections of inputs calls it too, because fx deletes children that are not called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, REFLECTION, layer_of_entry
from hra_fx.passes.reflection import REFLECTED, Reflection, is_rotated


def insert(graph_module: fx.GraphModule, uses: Iterable[fx.Node], *, child: str = REFLECTION) -> fx.GraphModule:
    """Insert a reflection for each use of a layer, in place, and recompile the graph.

    A use that has a reflection is left as it is. So is the call of a layer that changes its weight itself, such as
    attention.

    Args:
        graph_module: a graph that calls layers.
        uses: nodes of the graph, from `match`. Each layer has its adapter.
        child: the name of the adapter in its layer.

    Raises:
        GraphInvariantError: a layer has no adapter, or the input of a call is not a value of the graph.
    """
    reflections = {node: _reflection_of(graph_module, node, child) for node in uses}
    factors = _factors(graph_module)
    for node, reflection in reflections.items():
        if node.op == "get_attr":
            _insert_after(graph_module, node, child)
        elif reflection.reflects_input and REFLECTED not in node.kwargs:
            _insert_before(node, reflection, child, factors)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _reflection_of(graph_module: fx.GraphModule, node: fx.Node, child: str) -> Any:
    path = str(node.target) if node.op == "call_module" else layer_of_entry(graph_module, str(node.target))
    reflection = graph_module.get_submodule(path)._modules.get(child)
    if reflection is None:
        raise GraphInvariantError(f"{path}: it has no adapter ({child!r}). Add one first, with hra_fx.transform.")
    return reflection


def _factors(graph_module: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The node that computes the factors of all layers, if the graph has the child for it."""
    graph = graph_module.graph
    if not hasattr(graph_module, FACTORS):
        return ()
    if calls := graph.find_nodes(op="call_module", target=FACTORS):
        return (calls[0],)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return (graph.call_module(FACTORS),)


def _insert_before(node: fx.Node, child: Reflection, name: str, factors: tuple[fx.Node, ...]) -> None:
    # A keyword argument may have any name, depending on the layer's class.
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(value, fx.Node):
        raise GraphInvariantError(
            f"node {node.name!r}: the call of {node.target} has no traced input. Exclude this layer, or open an issue."
        )
    with node.graph.inserting_before(node):
        reflection = _reflection(node, f"{node.target}.{name}", (value, *factors), {})
    if "val" in value.meta and "val" in node.meta:
        reflection.meta["val"] = child.value_in_graph(value.meta["val"], node.meta["val"])
    if child.replaces_input:
        node.replace_input_with(value, reflection)
    node.kwargs = {**node.kwargs, REFLECTED: True if child.replaces_input else reflection}


def _insert_after(graph_module: fx.GraphModule, node: fx.Node, name: str) -> None:
    path = layer_of_entry(graph_module, str(node.target))
    layer = graph_module.get_submodule(path)
    readers = list(node.users)
    if isinstance(layer, ExpertsWeight):
        node.op, node.target = "call_module", path
        return
    if any(is_rotated(reader, name) for reader in readers):
        return
    if hasattr(layer, BASE_WEIGHT):
        node.target = f"{path}.{BASE_WEIGHT}"
    with node.graph.inserting_after(node):
        reflection = _reflection(node, f"{path}.{name}", (), {"weight": node})
    if "val" in node.meta:  # W Q has the shape and dtype of W
        reflection.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, reflection)


def _reflection(node: fx.Node, target: str, args: Any, kwargs: Any) -> fx.Node:
    reflection = node.graph.create_node("call_module", target, args, kwargs)
    reflection.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    return reflection
