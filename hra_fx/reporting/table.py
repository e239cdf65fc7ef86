"""Tables for a terminal. If a table is too wide, its texts are wrapped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

#: A console width at which nothing is wrapped.
UNLIMITED = 10_000


@dataclass(frozen=True)
class Column:
    """A column of a table with its heading."""

    name: str
    is_text: bool = False  # text is aligned left; numbers are aligned right


def table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> Table:
    """Create a table. Empty columns are left out."""
    used = [i for i in range(len(columns)) if not rows or any(row[i] for row in rows)]
    made = Table(box=box.SIMPLE_HEAD)
    for column in (columns[i] for i in used):
        if column.is_text:
            made.add_column(Text(column.name), overflow="fold")
        else:
            made.add_column(Text(column.name), justify="right", no_wrap=True)
    for row in rows:
        # Use Text, because names from a model may contain rich's markup.
        made.add_row(*(Text(row[i]) for i in used))
    return made
