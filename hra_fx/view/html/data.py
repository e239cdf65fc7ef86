"""The data of a page: the report, and all boxes as a list, each before those inside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

from hra_fx.reporting.colormap import DARK_PALETTE, PALETTE, UNKNOWN
from hra_fx.reporting.heat import HEATS, default_heat, heat_of, is_identity, scale
from hra_fx.view.drawing import Drawing
from hra_fx.view.layering import Layering
from hra_fx.view.options import OFF
from hra_fx.view.text import clean
from hra_fx.view.tree import Item, Leaf, Scope, span

_Edges: TypeAlias = tuple[tuple[int, int], ...]


def page_data(drawing: Drawing, depth: int | None, heat: str | None) -> dict[str, Any]:
    """The data of the script; `script/data.js` reads it.

    Args:
        drawing: the drawing of a model.
        depth: number of levels that are open at first; `None` for as many as are readable.
        heat: the heatmap that is shown at first; `None` for the default one.
    """
    items = items_of(drawing.tree())
    box = {path: index for index, item in reversed([*enumerate(items)]) for path in item["paths"]}
    data = {
        "title": drawing.title,
        "facts": drawing.facts,
        "depth": depth,
        "items": items,
        "rows": [vars(row) for row in drawing.rows],
        "heats": _heats(drawing),
        "heat": heat or (OFF if is_identity(drawing.rows) else default_heat(drawing.rows)),
        "trained": not is_identity(drawing.rows),
        "palettes": [PALETTE, DARK_PALETTE],
        "unknown": UNKNOWN,
        "skipped": [
            {"path": path, "reason": reason, "refused": path in drawing.refused, "item": _box(path, box)}
            for path, reason in drawing.skipped.items()
        ],
        "full": [{"path": path, "item": _box(path, box)} for path in drawing.trained_in_full],
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def items_of(item: Item, parent: int = 0, index: int = 0) -> list[dict[str, Any]]:
    """A box and all boxes inside it.

    Args:
        item: the box.
        parent: the index of the scope around it.
        index: its own index.
    """
    record = _leaf(item) if isinstance(item, Leaf) else _scope(item)
    items = [{"parent": parent, "label": span(item), "paths": item.paths, "count": item.count, **record}]
    for part in item.items if isinstance(item, Scope) else ():
        items += items_of(part, index, index + len(items))
    return items


def _leaf(leaf: Leaf) -> dict[str, Any]:
    return {
        "kind": leaf.kind,
        "detail": leaf.detail,
        "op": leaf.op,
        "target": leaf.target,
        "shape": leaf.shape,
        "dtype": leaf.dtype,
        "marks": [mark.path for mark in leaf.marks],
        "width": leaf.width,
        "rank": leaf.rank,
        "parameters": leaf.parameters,
    }


def _scope(scope: Scope) -> dict[str, Any]:
    flow = (len(scope.items), scope.edges, scope.inputs, scope.outputs)
    return {
        "kind": "untraced" if scope.eager else "traced",
        "detail": scope.class_name,
        "target": scope.path,
        "varied": scope.varied,
        "flow": None if scope.eager else _flow(*flow),
    }


@lru_cache(maxsize=64)  # blocks that repeat have the same layers
def _flow(count: int, edges: _Edges, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, Any]:
    """The layers of a scope: its boxes, borders and lanes as numbers from top to bottom, and its edges as chains."""
    layers = Layering(count, edges, inputs, outputs)
    number = {node: index for index, node in enumerate(node for row in layers.rows for node in row)}
    over = {node: number[upper] for node, upper in layers.over.items()}
    return {
        "rows": [[[node[0], node[1] >= 0, over.get(node, -1)] for node in row] for row in layers.rows],
        "chains": [[number[node] for node in layers.chain(*link)] for link in layers.links],
        "enters": bool(inputs),
        "leaves": bool(outputs),
    }


def _heats(drawing: Drawing) -> dict[str, Any]:
    """The value of every adapted layer, for each heatmap."""
    heats: dict[str, Any] = {}
    for name, heat in HEATS.items() if drawing.rows else ():
        values = heat_of(drawing.rows, name)
        ends = scale(values.values())
        heats[name] = {"words": heat.words, "unit": heat.unit, "ends": ends, "values": list(values.items())}
    return heats


def _box(path: str, box: Mapping[str, int]) -> int:
    """The box that stands for a module, else the innermost box around it."""
    while path and path not in box:
        path = path.rpartition(".")[0]
    return box.get(path, 0)


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN, and whose texts a page can show."""
    if isinstance(value, int):  # nearly all of a page
        return value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
