"""Print tables, headings and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000
#: Smallest width of a text column.
_NARROWEST = 12


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        is_text: whether it holds text, aligned left and wrapped; numbers are aligned right.
        priority: columns with the largest priority are dropped first if the table is too wide; 0 is never dropped.
    """

    name: str
    is_text: bool = False
    priority: int = 0


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for messages."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # Lines are not wrapped in a file or a pipe.
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else _UNLIMITED
    return Console(file=stream, width=width, highlight=False)


def show_table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> None:
    """Print a table with as many columns as fit; empty columns are left out."""
    console, wide = stdout(), Console(width=_UNLIMITED)
    limits = sorted({column.priority for column in columns}, reverse=True)
    tables = [_table(columns, rows, limit) for limit in limits]
    table = next((t for t in tables if wide.measure(t).maximum <= console.width), tables[-1])
    # On a very narrow terminal, wrapped lines are better than no column with names.
    console.width = max(console.width, _min_width(table))
    console.print(table)


def _table(columns: Sequence[Column], rows: Collection[Sequence[str]], limit: int) -> Table:
    kept = [i for i, column in enumerate(columns) if column.priority <= limit and any(row[i] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD)
    for i in kept:
        is_text = columns[i].is_text
        longest = max(len(text) for text in (columns[i].name, *(row[i] for row in rows)))
        table.add_column(
            Text(columns[i].name),
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
            min_width=min(_NARROWEST, longest) if is_text else longest,
        )
    for row in rows:
        # As Text, since names may contain rich markup.
        table.add_row(*(Text(row[i]) for i in kept))
    return table


def _min_width(table: Table) -> int:
    """The smallest width at which no number and no short word is broken."""
    return sum(column.min_width or 0 for column in table.columns) + 3 * len(table.columns) + 1


def show_heading(title: str, facts: Mapping[str, str]) -> None:
    """Print a title, and facts below it; empty facts are left out."""
    console = stdout()
    console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        if text:
            grid.add_row(Text(name), Text(text))
    if grid.row_count:
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def show_lines(heading: str, lines: Collection[str]) -> None:
    """Print a heading, and lines below it."""
    console = stdout()
    console.print(Text(heading, style="bold"))
    for line in lines:
        console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False))


def show_json(content: Any) -> None:
    """Print JSON, with null for non-finite numbers, and escapes for characters that the stream cannot encode."""
    text = json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_plain(content), indent=2, allow_nan=False)
    typer.echo(text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.as_posix() if isinstance(value, Path) else value


def count(number: int, noun: str) -> str:
    """A number with a noun.

    >>> count(1, "layer"), count(2000, "layer")
    ('1 layer', '2,000 layers')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def size(number: int) -> str:
    """A size in bytes.

    >>> size(512), size(2_300_000)
    ('512 B', '2.3 MB')
    """
    power = max(0, min(4, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}" if power else f"{number} B"
