"""match: find the nodes that use selected layers, their calls and the reads of their weights."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.layers.target import REFLECTION, find_kind, layer_of_entry, weight_entry
from hra_fx.selection.select import select

#: Attributes and methods that do not depend on the values of a tensor.
_METADATA = frozenset(
    ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout", "size", "dim", "numel", "element_size")
) | {"stride", "ndimension", "is_floating_point", "get_device"}


def match(graph_module: fx.GraphModule, config: HRAConfig | None = None, *, child: str = REFLECTION) -> list[fx.Node]:
    """Find the nodes that use layers, in the order of the graph. The graph is not changed.

    These are the calls of the layers, and the reads of their weights, unless only metadata, such as the dtype, is used.

    Args:
        graph_module: a graph that calls layers.
        config: its targets, exclusions and layer indices select the layers, as in `transform`. Without it, all layers
            that have an adapter are selected.
        child: the name of the adapter in a layer.

    Raises:
        SelectionError: the configuration does not fit the model.

    Example:
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> match(graph, HRAConfig(target_modules="all-linear", exclude_modules=["0"]))
        [_2]
    """
    if config is None:
        layers = {layer for layer in graph_module.modules() if child in layer._modules}
    else:
        layers = set(select(graph_module, config).values())
    return [node for node in graph_module.graph.nodes if _is_use(node, graph_module, layers)]


def _is_use(node: fx.Node, graph_module: fx.GraphModule, layers: set[nn.Module]) -> bool:
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target)) in layers
    if node.op != "get_attr":
        return False
    path = layer_of_entry(graph_module, str(node.target))
    layer = graph_module.get_submodule(path)
    is_weight = layer in layers and find_kind(layer) is not None and node.target == weight_entry(path, layer)
    return is_weight and not all(map(is_metadata, node.users))


def is_metadata(node: fx.Node) -> bool:
    """Whether a node reads a shape, a dtype or another property of a tensor that does not depend on its values."""
    return (node.target is getattr and node.args[1] in _METADATA) or (
        node.op == "call_method" and node.target in _METADATA
    )
