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
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hra_fx.reporting.table import UNLIMITED, Column, fit_table, min_width


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for messages."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # Lines are not wrapped in a file or a pipe.
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else UNLIMITED
    return Console(file=stream, width=width, highlight=False)


def show_table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> None:
    """Print a table with as many columns as fit; empty columns are left out."""
    console = stdout()
    table = fit_table(columns, rows, console.width)
    # On a very narrow terminal, wrapped lines are better than no column with names.
    console.width = max(console.width, min_width(table))
    console.print(table)


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
