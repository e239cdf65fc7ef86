r"""insert: add a reflection before each call of a layer, and after each read of a weight.

    y = layer(x)                    becomes        h = layer.hra_u(x, f);  y = layer(x, h)
    y = f(x, layer.weight)          becomes        w = layer.hra_u(weight=layer.hra_base);  y = f(x, w)
    y = f(x, experts.up)            becomes        w = experts.hra_up();  y = f(x, w)

For a Linear, `h = x Q^T` and the layer computes `h W^T = x (W Q)^T`. For a convolution, `h` contains the coordinates of
the patches, and the layer subtracts their image (`hra_fx.layers.variants.ConvAdapters`). The layer still gets `x` as
its first argument, so that hooks on the layer get the same input. For a weight, `hra_base` is the base weight, and `w`
is `W Q`. The weights of experts are rotated when they are used. The graph is the only record of these changes.

If the graph has the child `hra_factors`, the first node calls it, and `f` is its result for all layers. A graph without
reflections of inputs calls it too, because fx deletes children that are not called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, REFLECTION, layer_of_entry


class InsertPass(PassBase):
    """Inserts a reflection for each given node."""

    def __init__(self, uses: Iterable[fx.Node]) -> None:
        """Prepare for one graph; `uses` are its nodes that `passes.match.find_uses` found."""
        self._uses = list(uses)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        size = len(graph.nodes)
        factors = _factors(graph_module)
        for node in self._uses:
            if node.op == "get_attr":
                _insert_after(node, layer_of_entry(graph_module, str(node.target)))
            else:
                _insert_before(graph_module, node, factors)
        if is_changed := bool(self._uses) or len(graph.nodes) > size:
            graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, is_changed)


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


def _insert_before(graph_module: fx.GraphModule, node: fx.Node, factors: tuple[fx.Node, ...]) -> None:
    # A keyword argument may have any name, depending on the layer's class.
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(value, fx.Node):
        raise GraphInvariantError(
            f"node {node.name!r}: the call of {node.target} has no traced input. Exclude this layer, or open an issue."
        )
    with node.graph.inserting_before(node):
        reflection = _reflection(node, str(node.target), (value, *factors), {})
    if "val" in value.meta and "val" in node.meta:
        adapters: Any = graph_module.get_submodule(str(reflection.target))
        reflection.meta["val"] = adapters.value_in_graph(value.meta["val"], node.meta["val"])
    node.args, node.kwargs = (value, reflection), {}


def _insert_after(node: fx.Node, layer: str) -> None:
    if layer != str(node.target).rpartition(".")[0]:  # experts
        node.op, node.target = "call_module", layer
        return
    node.target = f"{layer}.{BASE_WEIGHT}"
    readers = list(node.users)
    with node.graph.inserting_after(node):
        reflection = _reflection(node, layer, (), {"weight": node})
    if "val" in node.meta:  # W Q has the shape and dtype of W
        reflection.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, reflection)


def _reflection(node: fx.Node, layer: str, args: Any, kwargs: Any) -> fx.Node:
    reflection = node.graph.create_node("call_module", f"{layer}.{REFLECTION}", args, kwargs)
    reflection.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    return reflection
