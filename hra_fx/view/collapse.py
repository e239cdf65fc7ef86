"""Collapses the modules of a drawing below a depth: each becomes one box.

This is for formats that keep every box (DOT, GraphML, JSON). Pictures and the page close modules in the tree of scopes,
where identical neighbors are merged.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from hra_fx.view.describe import name_of
from hra_fx.view.drawing import Drawing
from hra_fx.view.tree import Leaf, joined, module_of


def collapsed(drawing: Drawing, depth: int | None) -> Drawing:
    """A drawing with `depth` levels of modules open.

    Modules whose calls are interleaved depend on each other once they are collapsed, so the result may have cycles.

    Args:
        drawing: the drawing of the model, or of a part of it.
        depth: as in `Options`; `None` for all levels.
    """
    if depth is None:
        return drawing
    picture = drawing.picture
    box = {key: _box(key, data["leaf"], depth) for key, data in picture.nodes(data=True)}
    members: dict[str, list[Leaf]] = {}
    for key, data in picture.nodes(data=True):
        members.setdefault(box[key], []).append(data["leaf"])
    part: nx.DiGraph[str] = nx.DiGraph()
    part.graph.update(picture.graph)
    for name, leaves in members.items():
        open_box = len(leaves[0].place) <= depth
        part.add_node(name, leaf=leaves[0] if open_box else _module(leaves, depth, picture.graph["classes"]))
    part.add_edges_from((box[a], box[b]) for a, b in picture.edges if box[a] != box[b])
    return replace(drawing, picture=part)


def _box(key: str, leaf: Leaf, depth: int) -> str:
    return key if len(leaf.place) <= depth else f"module:{leaf.place[depth]}"


def _module(leaves: list[Leaf], depth: int, classes: dict[str, str]) -> Leaf:
    """One leaf for all leaves of a collapsed module."""
    call = leaves[0].place[depth]
    path = module_of(call)
    inside = joined(leaves)
    return Leaf(
        name=name_of(call),
        detail=classes.get(path, ""),
        kind="module",
        op="call_module",
        target=path,
        place=leaves[0].place[:depth],
        marks=inside.marks,
        paths=(path, *dict.fromkeys(inside.paths)),
        skipped=inside.skipped,
        trained=inside.trained,
        parameters=inside.parameters,
    )
