"""Print tables, headings and JSON."""

from __future__ import annotations

import dataclasses
import json
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


def console_on(stream: TextIO) -> Console:
    """Create a console for results (stdout) or messages (stderr). Lines are not wrapped in a file or a pipe."""
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else UNLIMITED
    return Console(file=stream, width=width, highlight=False)


def show_result(result: Any, *, as_json: bool) -> None:
    """Print a result of the library: its own summary, or its fields as JSON."""
    show_json(result) if as_json else console_on(sys.stdout).print(str(result), markup=False, soft_wrap=True)


def show_table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> None:
    """Print a table with as many columns as fit. Empty columns are left out."""
    console = console_on(sys.stdout)
    table = fit_table(columns, rows, console.width)
    # On a very narrow terminal, wrapped lines are better than a missing column of names.
    console.width = max(console.width, min_width(table))
    console.print(table)


def show_heading(title: str, facts: Mapping[str, str]) -> None:
    """Print a title with facts below it. Empty facts are left out."""
    console = console_on(sys.stdout)
    console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        if text:
            grid.add_row(Text(name), Text(text))
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def show_lines(heading: str, lines: Collection[str]) -> None:
    """Print a heading with lines below it."""
    console = console_on(sys.stdout)
    console.print(Text(heading, style="bold"))
    for line in lines:
        console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False))


def show_json(content: Any) -> None:
    """Print JSON, with null for non-finite numbers."""
    known = json.loads(json.dumps(content, default=_plain), parse_constant=lambda name: None)
    typer.echo(json.dumps(known, indent=2))


def _plain(value: Any) -> Any:
    """Convert a path, a set or a dataclass for JSON."""
    if isinstance(value, Path):
        return value.as_posix()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else sorted(value)  # type: ignore[arg-type]


def count(number: int, noun: str) -> str:
    """Format a number with a noun.

    >>> count(1, "layer"), count(2000, "layer")
    ('1 layer', '2,000 layers')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def span(numbers: Collection[int]) -> str:
    """Format the smallest and the largest number.

    >>> span([4, 2, 3]), span([3, 3])
    ('2 to 4', '3')
    """
    return str(min(numbers)) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
