"""The data of a page: the report, and a list of all boxes. Each box comes before the boxes inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hra_fx.reporting.heat import DARK_PALETTE, HEATS, PALETTE, UNKNOWN, default_heat, heat_of, is_identity, scale
from hra_fx.reporting.report import without_nan
from hra_fx.view.drawing import Drawing
from hra_fx.view.opening import Options
from hra_fx.view.tree import Item, Leaf, Scope, span


def page_data(drawing: Drawing, tree: Scope, options: Options) -> dict[str, Any]:
    """Create the data for the script; `script/data.js` reads it.

    Args:
        drawing: the drawing of a model.
        tree: the tree of the drawing.
        options: the heatmap that is shown first.
    """
    items = items_of(tree)
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
    plain: dict[str, Any] = without_nan(data)
    return plain


def walk(item: Item) -> Iterator[Item]:
    """A box and all boxes inside it, in the order of their numbers."""
    yield item
    for part in item.items if isinstance(item, Scope) else ():
        yield from walk(part)


def items_of(tree: Scope) -> Sequence[dict[str, Any]]:
    """The boxes of a tree, each with the number of its scope."""
    items = [*walk(tree)]
    index = {id(item): number for number, item in enumerate(items)}
    around = {id(part): index[id(item)] for item in items if isinstance(item, Scope) for part in item.items}
    return [
        {
            "parent": around.get(id(item), 0),
            "label": span(item),
            "paths": item.paths,
            "count": item.count,
            **(_leaf(item) if isinstance(item, Leaf) else _scope(item)),
        }
        for item in items
    ]


def _leaf(leaf: Leaf) -> dict[str, Any]:
    return {
        "kind": leaf.kind,
        "detail": leaf.detail,
        "op": leaf.op,
        "target": leaf.target,
        "shape": leaf.shape,
        "dtype": leaf.dtype,
        "marks": leaf.marks,
        "rank": leaf.rank,
        "parameters": leaf.parameters,
    }


def _scope(scope: Scope) -> dict[str, Any]:
    return {"kind": "untraced" if scope.eager else "traced", "detail": scope.class_name, "target": scope.path}


def _heats(drawing: Drawing) -> dict[str, Any]:
    """The value of every adapted layer, for each heatmap."""
    heats: dict[str, Any] = {}
    for name, heat in HEATS.items() if drawing.rows else ():
        values = heat_of(drawing.rows, name)
        ends = scale(values.values())
        heats[name] = {"words": heat.words, "unit": heat.unit, "ends": ends, "values": list(values.items())}
    return heats


def _box(path: str, box: Mapping[str, int]) -> int:
    """The box that represents a module, or else the innermost box that contains it."""
    while path and path not in box:
        path = path.rpartition(".")[0]
    return box.get(path, 0)
