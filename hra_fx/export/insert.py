r"""Insert rotations of weights into a captured graph, and remove them.

y = linear(x, w)        becomes        h = hra_fx.rotate(w, u, a, apply_GS, columns);  y = linear(x, h)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from hra_fx.export.match import GraphLayer
from hra_fx.export.ops import ROTATE
from hra_fx.layers.target import META, NodeTag


def insert_rotation(
    graph: fx.Graph, layer: GraphLayer, weight: fx.Node, vectors: fx.Node, anchor: fx.Node | None, *, apply_GS: bool
) -> None:
    """Rotate the weight of a layer by one node, inserted before its first use, for all its uses.

    Args:
        graph: the graph, which is modified.
        layer: a layer of `graph`.
        weight: the node of its weight.
        vectors: the node of its vectors.
        anchor: the node of its anchor, if it has one.
        apply_GS: whether the adapter uses Gram-Schmidt.
    """
    users = {use.first_user for use in layer.uses}
    first = next(node for node in graph.nodes if node in users)
    consumer = next(use.consumer for use in layer.uses if use.first_user is first)
    with graph.inserting_before(first):
        arguments = (weight, vectors, anchor, apply_GS, layer.transposed)
        rotated = graph.create_node("call_function", ROTATE, arguments, {}, name=f"{weight.name}_rotated")
    rotated.meta = {key: consumer.meta[key] for key in ("nn_module_stack", "stack_trace") if key in consumer.meta}
    values = [argument.meta.get("val") if isinstance(argument, fx.Node) else argument for argument in arguments]
    if values[0] is not None and values[1] is not None:
        with torch.no_grad():
            rotated.meta["val"] = ROTATE(*values)
    rotated.meta[META] = NodeTag(layer.path, layer.kind, "reflection")
    for use in layer.uses:
        use.first_user.replace_input_with(use.weight, rotated)


def split_shared_uses(layers: Iterable[GraphLayer], node_of: Callable[[str], fx.Node]) -> None:
    """After all insertions: other layers with the same weight read it by their own names.

    Args:
        layers: the adapted layers.
        node_of: returns the node of a name.
    """
    for layer in layers:
        for use, name in layer.others:
            # No effect on adapted layers: their first users read the rotated weight now.
            use.first_user.replace_input_with(use.weight, node_of(name))


def find_rotate_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `hra_fx::rotate`, in the order of the graph."""
    return list(graph.find_nodes(op="call_function", target=ROTATE))


def remove_rotation(graph: fx.Graph, rotated: fx.Node) -> list[fx.Node]:
    """Replace a rotated weight by the base weight; returns the nodes of its vectors, which may have no users now.

    Args:
        graph: the graph, which is modified.
        rotated: one of `find_rotate_nodes(graph)`.
    """
    weight, *adapter = rotated.args[:3]
    assert isinstance(weight, fx.Node)
    rotated.replace_all_uses_with(weight)
    graph.erase_node(rotated)
    return [node for node in adapter if isinstance(node, fx.Node)]
