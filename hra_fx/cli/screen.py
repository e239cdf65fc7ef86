"""What is printed: tables that lose columns before they lose letters, and JSON."""

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
#: Letters of a line in a column of words.
_FEWEST = 12


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        words: whether it holds words, and not numbers.
        rank: which columns a narrow terminal does without: the largest go first, 0 never.
    """

    name: str
    words: bool = False
    rank: int = 0


def stdout() -> Console:
    """The console for what was asked for."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for what is said besides."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # A file or a program at the other end of a pipe has no width, and wants whole lines.
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else _UNLIMITED
    return Console(file=stream, width=width, highlight=False)


def show_table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> None:
    """A table with as many columns as fit; those in which nothing stands are left out."""
    console, wide = stdout(), Console(width=_UNLIMITED)
    limits = sorted({column.rank for column in columns}, reverse=True)
    tables = [_table(columns, rows, limit) for limit in limits]
    table = next((t for t in tables if wide.measure(t).maximum <= console.width), tables[-1])
    # Wider than a terminal of a few letters, rather than without the column that says what the others are of.
    console.width = max(console.width, _least(table))
    console.print(table)


def _table(columns: Sequence[Column], rows: Collection[Sequence[str]], limit: int) -> Table:
    kept = [i for i, column in enumerate(columns) if column.rank <= limit and any(row[i] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD)
    for i in kept:
        words = columns[i].words
        longest = max(len(letters) for letters in (columns[i].name, *(row[i] for row in rows)))
        table.add_column(
            Text(columns[i].name),
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
            min_width=min(_FEWEST, longest) if words else longest,
        )
    for row in rows:
        # As Text, for names may hold what rich takes for its markup.
        table.add_row(*(Text(row[i]) for i in kept))
    return table


def _least(table: Table) -> int:
    """How wide a table is at least, with what stands between its columns."""
    return sum(column.min_width or 0 for column in table.columns) + 3 * len(table.columns) + 1


def show_heading(title: str, facts: Mapping[str, str]) -> None:
    """A title, and below it what is to be said at once; empty facts are left out."""
    console = stdout()
    console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, words in facts.items():
        if words:
            grid.add_row(Text(name), Text(words))
    if grid.row_count:
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def show_lines(heading: str, lines: Collection[str]) -> None:
    """A heading with lines below it."""
    console = stdout()
    console.print(Text(heading, style="bold"))
    for line in lines:
        console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False))


def show_json(content: Any) -> None:
    """JSON, with null for what is not finite, and escapes for what the stream cannot hold."""
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
    """A number of things.

    >>> count(1, "layer"), count(2000, "layer")
    ('1 layer', '2,000 layers')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def size(number: int) -> str:
    """A number of bytes.

    >>> size(512), size(2_300_000)
    ('512 B', '2.3 MB')
    """
    power = max(0, min(4, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}" if power else f"{number} B"
