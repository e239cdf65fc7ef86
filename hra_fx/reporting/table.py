"""Tables for a terminal: columns that do not fit are dropped before any text is cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: A console width at which nothing is wrapped.
UNLIMITED = 10_000
_NARROWEST = 12  # characters per line of a text column


@dataclass(frozen=True)
class Column:
    """A column of a table with its heading."""

    name: str
    is_text: bool = False  # text is aligned left and wrapped; numbers are aligned right
    priority: int = 0  # the largest is dropped first if the table is too wide; 0 is never dropped


def fit_table(columns: Sequence[Column], rows: Collection[Sequence[str]], width: int) -> Table:
    """Create a table with as many columns as fit into a width in characters. Empty columns are left out."""
    used = [i for i, column in enumerate(columns) if not rows or any(row[i] for row in rows)]
    console = Console(width=UNLIMITED)
    for limit in sorted({columns[i].priority for i in used}, reverse=True):
        kept = [i for i in used if columns[i].priority <= limit]
        table = _table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
        if console.measure(table).maximum <= width:
            break
    return table


def min_width(table: Table) -> int:
    """The smallest width of a table at which no number or short word is broken across lines."""
    return sum(column.min_width or 0 for column in table.columns) + 3 * len(table.columns) + 1


def _table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        longest = max(len(text) for text in (column.name, *(row[i] for row in rows)))
        table.add_column(
            Text(column.name),
            justify="left" if column.is_text else "right",
            overflow="fold",
            no_wrap=not column.is_text,
            min_width=min(_NARROWEST, longest) if column.is_text else longest,
        )
    for row in rows:
        # Use Text, because names from a model may contain rich's markup.
        table.add_row(*map(Text, row))
    return table
