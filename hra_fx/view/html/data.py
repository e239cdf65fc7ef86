"""The data of a page: the report, and all boxes as a list, each before those inside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from hra_fx.reporting.colormap import DARK_PALETTE, PALETTE, UNKNOWN
from hra_fx.reporting.heat import HEATS, default_heat, heat_of, is_identity, scale
from hra_fx.view.boxes import scope_rows
from hra_fx.view.drawing import Drawing
from hra_fx.view.opening import open_scopes
from hra_fx.view.options import Options
from hra_fx.view.text import clean
from hra_fx.view.tree import Item, Leaf, Scope, span


def page_data(drawing: Drawing, options: Options) -> dict[str, Any]:
    """The data of the script; `script/data.js` reads it.

    Args:
        drawing: the drawing of a model.
        options: what is open and which heatmap is shown at first.
    """
    tree = drawing.tree()
    items = items_of(tree, open_scopes(tree, options.depth, options.focus or ""))
    box = {path: index for index, item in reversed([*enumerate(items)]) for path in item["paths"]}
    data = {
        "title": drawing.title,
        "facts": drawing.facts,
        "items": items,
        "rows": [vars(row) for row in drawing.rows],
        "heats": _heats(drawing),
        "heat": options.heat or ("" if is_identity(drawing.rows) else default_heat(drawing.rows)),
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


def items_of(item: Item, is_open: Collection[int] = (), parent: int = 0, index: int = 0) -> list[dict[str, Any]]:
    """A box and all boxes inside it.

    Args:
        item: the box.
        is_open: the ids of the scopes that are open at first.
        parent: the index of the scope around it.
        index: its own index.
    """
    record = _leaf(item) if isinstance(item, Leaf) else {"open": id(item) in is_open, **_scope(item)}
    items = [
        {
            "parent": parent,
            "label": span(item),
            "paths": item.paths,
            "count": item.count,
            **record,
        }
    ]
    for part in item.items if isinstance(item, Scope) else ():
        items += items_of(part, is_open, index, index + len(items))
    return items


def _leaf(leaf: Leaf) -> dict[str, Any]:
    return {
        "kind": leaf.kind,
        "detail": leaf.detail,
        "op": leaf.op,
        "target": leaf.target,
        "shape": leaf.shape,
        "dtype": leaf.dtype,
        "marks": leaf.marks,
        "width": leaf.width,
        "rank": leaf.rank,
        "parameters": leaf.parameters,
    }


def _scope(scope: Scope) -> dict[str, Any]:
    flow = {"edges": scope.edges, "inputs": scope.inputs, "outputs": scope.outputs}
    return {
        "kind": "untraced" if scope.eager else "traced",
        "detail": scope.class_name,
        "target": scope.path,
        "flow": {"rows": scope_rows(scope), **flow},
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
