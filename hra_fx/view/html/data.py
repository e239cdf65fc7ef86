"""The data of the page's script, as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hra_fx.reporting.colormap import PALETTE, UNKNOWN
from hra_fx.reporting.heat import HEATS, heat_of, scale
from hra_fx.reporting.row import Row
from hra_fx.view.drawing import Drawing
from hra_fx.view.html.items import Items
from hra_fx.view.html.packing import Texts, column, columns
from hra_fx.view.text import clean

#: The heatmap that is shown at first.
_FIRST_HEAT = "mean_angle"
_DIGITS, _DIGITS_OF_MANY = 9, 7


def page_data(drawing: Drawing, depth: int | None, heat: str | None) -> dict[str, Any]:
    """The data of the script; `script/data.js` reads it.

    Args:
        drawing: the drawing of a model.
        depth: number of levels that are open at first; `None` for as many as are readable.
        heat: the heatmap that is shown at first; `None` for the mean angle.
    """
    texts = Texts()
    items = Items(texts)
    items.add(drawing.tree())
    skipped = {texts.number(path): texts.number(why) for path, why in drawing.skipped.items()}
    data = {
        "title": clean(drawing.title),
        "facts": clean(drawing.facts),
        "depth": depth,
        "items": columns(items.records),
        "count": len(items.records),
        "layerings": items.layerings,
        "rows": _rows(drawing.rows, texts),
        "heats": _heats(drawing.rows, texts),
        "heat": heat or _FIRST_HEAT,
        "palette": PALETTE,
        "unknown": UNKNOWN,
        "skipped": {
            "paths": list(skipped),
            "reasons": list(skipped.values()),
            "items": [_holder(path, items) for path in drawing.skipped],
        },
        "trained": {
            "paths": texts.numbers(drawing.trained_in_full),
            "items": [_holder(path, items) for path in drawing.trained_in_full],
        },
    }
    return {**data, "texts": texts.shown()}


def _rows(rows: Sequence[Row], texts: Texts) -> dict[str, Any]:
    """The rows of the report as columns: texts (as indices into `texts`) and numbers."""
    values = {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(Row)}
    words = {name: found for name, found in values.items() if found and isinstance(found[0], str)}
    others = {name: [_plain(value) for value in found] for name, found in values.items() if name not in words}
    return {
        "count": len(rows),
        "texts": {name: column(texts.numbers(found)) for name, found in words.items()},
        "numbers": {name: column(found) for name, found in others.items()},
    }


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN; numbers are rounded."""
    if isinstance(value, float):
        return _rounded(value, _DIGITS)
    if isinstance(value, tuple):
        return [_rounded(entry, _DIGITS_OF_MANY) for entry in value]
    return value


def _rounded(value: float, digits: int) -> float | str:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)


def _heats(rows: Sequence[Row], texts: Texts) -> dict[str, Any]:
    """The value of every adapted layer, for each heatmap."""
    heats: dict[str, Any] = {}
    for name, heat in HEATS.items() if rows else ():
        values: Mapping[str, float] = heat_of(rows, name)
        heats[name] = {
            "words": heat.words,
            "unit": heat.unit,
            "top": scale(values.values()),
            "paths": texts.numbers(list(values)),
            "values": [_rounded(value, _DIGITS) for value in values.values()],
        }
    return heats


def _holder(path: str, items: Items) -> int:
    """The box that stands for a module, else the innermost box around it."""
    if path in items.holders:
        return items.holders[path]
    while path and path not in items.scopes and path not in items.holders:
        path = path.rpartition(".")[0]
    return items.holders.get(path, items.scopes.get(path, 0))
