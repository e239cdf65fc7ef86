"""A report in a notebook: HTML without a style sheet or text colors of its own, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from html import escape

from hra_fx.reporting.columns import heading, table_of
from hra_fx.reporting.footnotes import Footnote
from hra_fx.reporting.row import Row
from hra_fx.reporting.table import Column

# Half-transparent, to be visible on white and on black with readable text on top.
_BAR = "rgba(96,128,160,.38)"
_LINE = "rgba(128,128,128,.35)"
#: Tables with more rows scroll.
_MANY = 40


def as_html(rows: Collection[Row], footnotes: Collection[Footnote]) -> str:
    """The table, with a bar behind each change of a weight, and the footnotes as sections that open."""
    columns, cells = table_of(rows)
    top = max((row.weight_change for row in rows if not math.isnan(row.weight_change)), default=0.0)
    scroll = "max-height:40em;overflow:auto" if len(rows) > _MANY else "overflow-x:auto"
    parts = [
        f"<div><p><strong>{escape(heading(rows))}</strong></p>",
        f'<div style="{scroll}"><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">',
        f"<thead><tr>{''.join(_head(column) for column in columns)}</tr></thead><tbody>",
        *(
            f"<tr>{''.join(_cells(columns, texts, row.weight_change / top if row.weight_change > 0 else 0))}</tr>"
            for row, texts in zip(rows, cells, strict=True)
        ),
        "</tbody></table></div>",
        *map(_footnote, footnotes),
        "</div>",
    ]
    return "\n".join(parts)


def _head(column: Column) -> str:
    return f'<th scope="col" style="{_style(column)};border-bottom:1px solid {_LINE}">{escape(column.name)}</th>'


def _cells(columns: Sequence[Column], texts: Sequence[str], share: float) -> Iterator[str]:
    """The cells of a row; `share` is the length of the bar behind the change of the weight."""
    for column, text in zip(columns, texts, strict=True):
        style = _style(column)
        if column.name == "weight change" and share:
            style += f";background:linear-gradient(to right,{_BAR} {share:.1%},transparent {share:.1%})"
        yield f'<td style="{style}">{escape(text)}</td>'


def _style(column: Column) -> str:
    return f"text-align:{'left' if column.is_text else 'right'};white-space:nowrap;padding:.15em .6em"


def _footnote(footnote: Footnote) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in footnote.lines)
    return f"<details><summary>{escape(footnote.heading)}</summary><ul>{items}</ul></details>"
