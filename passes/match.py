"""match: find the calls of selected layers, and the reads of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from hra_fx.layers.target import REFLECTION, layer_of_entry, weight_entry

#: Attributes and methods that do not depend on the values of a tensor.
_METADATA = frozenset(
    ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout", "size", "dim", "numel", "element_size")
) | {"stride", "ndimension", "is_floating_point", "get_device"}


def find_uses(graph_module: fx.GraphModule, is_selected: Callable[[str, nn.Module], bool]) -> list[fx.Node]:
    """Find the nodes for which `insert` has to add a reflection. The graph is not changed.

    These are the calls of layers that reflect their input, and the reads of the weights of adapted layers, unless only
    metadata, such as the dtype, is used. A call that already takes a reflection is not found. A module that is called
    as a whole, such as attention, rotates the weights inside it, so it does not need a reflection either.

    Args:
        graph_module: a graph that calls layers.
        is_selected: whether to find the uses of an adapted layer. Takes its path in the graph, by which it is called or
            read, and the layer, which has its adapters as its child `hra_u`.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> from hra_fx.passes.fold import FoldPass
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> graph = transform(graph, HRAConfig(r=2, target_modules=["0", "2"]))
        >>> [node.target for node in FoldPass()(graph).graph_module.graph.nodes]
        ['input', '0', '1', '2', 'output']
        >>> find_uses(graph, lambda path, layer: path != "0")
        [_2]
    """
    return [node for node in graph_module.graph.nodes if _is_use(node, graph_module, is_selected)]


def _is_use(node: fx.Node, graph_module: fx.GraphModule, is_selected: Callable[[str, nn.Module], bool]) -> bool:
    if node.op not in ("call_module", "get_attr"):
        return False
    path = target = str(node.target)
    if node.op == "get_attr":
        path = layer_of_entry(graph_module, target)
    layer = graph_module.get_submodule(path)
    if REFLECTION not in layer._modules or not is_selected(path, layer):
        return False
    if node.op == "get_attr":
        return target == weight_entry(path, layer) and not all(map(is_metadata, node.users))
    adapters: Any = layer._modules[REFLECTION]
    return bool(adapters.reflects_input) and len(node.args) + len(node.kwargs) == 1


def is_metadata(node: fx.Node) -> bool:
    """Whether a node reads a shape, a dtype or another property of a tensor that does not depend on its values."""
    return (node.target is getattr and node.args[1] in _METADATA) or (
        node.op == "call_method" and node.target in _METADATA
    )
