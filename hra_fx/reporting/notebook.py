"""A report in a notebook: HTML without a style sheet or a colour of its own, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from html import escape

from hra_fx.reporting.columns import Column, columns_for, heading
from hra_fx.reporting.footnotes import Remark, remarks
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import Missed

# Half-transparent, so that it shows on white and on black, and the text on it stays readable.
_BAR = "rgba(96,128,160,.38)"
_LINE = "rgba(128,128,128,.35)"
#: From so many rows on they scroll.
_MANY = 40


def as_html(rows: Collection[Row], missed: Collection[Missed]) -> str:
    """The table, with a bar behind each mean angle, and the remarks as parts that open."""
    columns = columns_for(rows)
    top = max((row.mean_angle for row in rows if not math.isnan(row.mean_angle)), default=0.0)
    tall = "max-height:40em;overflow:auto" if len(rows) > _MANY else "overflow-x:auto"
    parts = [
        f"<div><p><strong>{escape(heading(rows))}</strong></p>",
        f'<div style="{tall}"><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">',
        f"<thead><tr>{''.join(_head(column) for column in columns)}</tr></thead><tbody>",
        *(f"<tr>{''.join(_cells(row, columns, top))}</tr>" for row in rows),
        "</tbody></table></div>",
        *(_remark(remark) for remark in remarks(rows, missed)),
        "</div>",
    ]
    return "\n".join(parts)


def _head(column: Column) -> str:
    return f'<th scope="col" style="{_side(column)};border-bottom:1px solid {_LINE}">{escape(column.name)}</th>'


def _cells(row: Row, columns: Collection[Column], top: float) -> Iterator[str]:
    for column in columns:
        style = _side(column)
        if column.name == "mean angle" and row.mean_angle > 0:
            part = 100 * row.mean_angle / top
            style += f";background:linear-gradient(to right,{_BAR} {part:.1f}%,transparent {part:.1f}%)"
        yield f'<td style="{style}">{escape(column.text(row))}</td>'


def _side(column: Column) -> str:
    return f"text-align:{'left' if column.words else 'right'};white-space:nowrap;padding:.15em .6em"


def _remark(remark: Remark) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in remark.lines)
    return f"<details><summary>{escape(remark.heading)}</summary><ul>{items}</ul></details>"
