r"""The rotation of a weight, put into a captured graph before what reads it, and taken out again.

y = linear(x, w)        becomes        h = hra_fx.rotate(w, u, a, apply_GS, columns);  y = linear(x, h)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from hra_fx.export.match import GraphSite
from hra_fx.export.ops import ROTATE
from hra_fx.layers.target import META, SiteNote


@dataclass(frozen=True)
class Tensors:
    """The nodes of an adapter at one site: `vectors`, and `anchor` if it has one."""

    vectors: fx.Node
    anchor: fx.Node | None


def insert(graph: fx.Graph, site: GraphSite, weight: fx.Node, tensors: Tensors, *, apply_GS: bool) -> fx.Node:
    """Rotate the weight of a site for every read of it, by one node before the first.

    Args:
        graph: the graph, which is changed.
        site: a site whose reads are nodes of `graph`.
        weight: the node of its weight.
        tensors: the nodes of its vectors.
        apply_GS: whether Gram-Schmidt makes the vectors orthonormal first.

    Returns:
        The new node.
    """
    users = {read.first for read in site.reads}
    first = next(node for node in graph.nodes if node in users)
    reader = next(read.reader for read in site.reads if read.first is first)
    with graph.inserting_before(first):
        arguments = (weight, tensors.vectors, tensors.anchor, apply_GS, site.columns)
        rotated = graph.create_node("call_function", ROTATE, arguments, {}, name=f"{weight.name}_rotated")
    rotated.meta = {key: reader.meta[key] for key in ("nn_module_stack", "stack_trace") if key in reader.meta}
    values = [argument.meta.get("val") if isinstance(argument, fx.Node) else argument for argument in arguments]
    if values[0] is not None and values[1] is not None:
        with torch.no_grad():
            rotated.meta["val"] = ROTATE(*values)
    rotated.meta[META] = SiteNote(site.path, site.kind, "reflection")
    for read in site.reads:
        read.first.replace_input_with(read.weight, rotated)
    return rotated


def separate(sites: Iterable[GraphSite], node_of: Callable[[str], fx.Node]) -> None:
    """After all insertions: let the other layers that shared a tensor with adapted ones read it under their own names.

    Args:
        sites: the adapted sites.
        node_of: gives the node of a name.
    """
    for site in sites:
        for read, name in site.others:
            # Of an adapted layer the first user reads the rotation by now, and is left alone.
            read.first.replace_input_with(read.weight, node_of(name))


def rotations(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of all rotations, in their order."""
    return list(graph.find_nodes(op="call_function", target=ROTATE))


def remove(graph: fx.Graph, rotated: fx.Node) -> list[fx.Node]:
    """Let what read a rotated weight read the weight itself; returns the nodes of the vectors, perhaps of no more use.

    Args:
        graph: the graph, which is changed.
        rotated: one of `rotations(graph)`.
    """
    weight, *tensors = rotated.args[:3]
    assert isinstance(weight, fx.Node)
    rotated.replace_all_uses_with(weight)
    graph.erase_node(rotated)
    return [node for node in tensors if isinstance(node, fx.Node)]
