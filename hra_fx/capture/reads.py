"""Weights that a graph reads without calling their layer: there, a reflection of the layer would do nothing."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

_METADATA = frozenset({"dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "layout"})


def functional_reads(graph: fx.Graph, sites: Iterable[str]) -> dict[str, fx.Node]:
    """Sites whose weight or bias is an operand in the graph.

    Reads of the dtype, device or shape alone (as transformers does of `self.wo.weight.dtype`) do not count.

    Args:
        graph: a traced graph.
        sites: paths of sites, as the graph names them.

    Returns:
        site path -> the first node that uses its weight.
    """
    paths = set(sites)
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op != "get_attr" or owner not in paths:
            continue
        users = [user for user in node.users if not _is_metadata(user)]
        if users:
            found.setdefault(owner, users[0])
    return found


def _is_metadata(node: fx.Node) -> bool:
    return (node.target is getattr and node.args[1] in _METADATA) or (
        node.op == "call_method" and node.target in ("size", "dim")
    )
