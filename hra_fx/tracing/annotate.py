"""Which nodes of a recorded graph belong to which site."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from hra_fx.layers import variants as forms
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import rotated_weight
from hra_fx.layers.target import META, REFLECTION, NodeTag

_REFLECTIONS = (forms.reflected_rows, forms.patch_coordinates, rotated_weight)
_VECTORS = 1  # which argument of these the vectors are


def mark(graph: fx.Graph, sites: Mapping[str, AdaptedLayer]) -> None:
    """Leave a `NodeTag` on the reflections of a graph, on the layers that they are for, and on readers of weights.

    Args:
        graph: one whose `get_attr` nodes have the names of the model's parameters.
        sites: path -> layer, of the same model.
    """
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _REFLECTIONS:
            continue
        path = _owner(node.args[_VECTORS])
        if path is None or path not in sites:
            continue
        layer = sites[path]
        node.meta[META] = NodeTag(path, layer.hra_u.kind, "reflection")
        weight = f"{path}.{layer.hra_u.weight_name}".lstrip(".")
        of_weight = node.target is rotated_weight
        sources = [node] if of_weight else graph.find_nodes(op="get_attr", target=weight)
        for source in sources:
            for reader in source.users:
                _mark_reader(reader, path, layer, of_weight=of_weight)


def _mark_reader(reader: fx.Node, path: str, layer: AdaptedLayer, *, of_weight: bool) -> None:
    """Mark what takes the weight, if that is the layer itself, or takes the rotated one."""
    note = reader.meta.get(META)
    if note is None and reader.target is not forms.patch_image:
        _mark_first(reader, path, layer, of_weight=of_weight)
    elif note is not None and of_weight and path not in (note.path, *note.also):
        reader.meta[META] = replace(note, also=(*note.also, path))


def _mark_first(reader: fx.Node, path: str, layer: AdaptedLayer, *, of_weight: bool) -> None:
    place = next(reversed(reader.meta.get("nn_module_stack") or {"": None}))
    if place == path:
        reader.meta[META] = NodeTag(path, layer.hra_u.kind, "layer")
    elif of_weight:
        reader.meta[META] = NodeTag(path, layer.hra_u.kind, "reader")


def _owner(vectors: object) -> str | None:
    """The path of the site whose vectors a node makes, from the name of what it is made of."""
    waiting = [vectors]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node):
            continue
        if node.op == "get_attr" and (found := re.fullmatch(rf"(?:(.*)\.)?{REFLECTION}\.[^.]+", str(node.target))):
            return found[1] or ""
        waiting.extend(node.all_input_nodes)
    return None
