"""Weights that a graph reads without calling their layer: there, a reflection of the layer's input would do nothing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from hra_fx.layers.target import kind_of, weight_name

#: What may be asked of a weight without using it: by a node, or in a line of source.
METADATA = frozenset(
    ("dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout", "size", "dim", "numel", "element_size")
)


def functional_reads(graph: fx.Graph, sites: Mapping[str, nn.Module]) -> dict[str, fx.Node]:
    """Sites whose weight is an operand in the graph.

    Reads of the dtype, device or shape alone (as transformers does of `self.wo.weight.dtype`) do not count.

    Args:
        graph: a traced graph.
        sites: paths of sites, as the graph names them, and their layers.

    Returns:
        site path -> the first node that uses its weight.
    """
    names = {f"{path}.{weight_name(kind_of(layer))}".lstrip("."): path for path, layer in sites.items()}
    found: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in names:
            continue
        users = [user for user in node.users if not _is_metadata(user)]
        if users:
            found.setdefault(names[str(node.target)], users[0])
    return found


def _is_metadata(node: fx.Node) -> bool:
    return (node.target is getattr and node.args[1] in METADATA) or (
        node.op == "call_method" and node.target in METADATA
    )
