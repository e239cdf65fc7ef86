"""What commands print: tables, headings and JSON; and errors and warnings as one line on stderr, with exit codes.

Only unexpected errors show a traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, TextIO, TypeAlias

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from hra_fx.errors import HRAError, HRAWarning
from hra_fx.removed import COMMAND_LINE
from hra_fx.reporting.table import UNLIMITED, Column, table
from hra_fx.reporting.words import plain

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
#: Exit code if a check failed.
CHECK_FAILED = 1
#: Exit code of errors.
FAILED = 2
#: Exit code of shells for a program stopped by Ctrl-C.
INTERRUPTED = 130


def console_on(stream: TextIO) -> Console:
    """Create a console for results (stdout) or messages (stderr). Lines are not wrapped in a file or a pipe."""
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else UNLIMITED
    return Console(file=stream, width=width, highlight=False)


def show_result(result: Any, *, as_json: bool) -> None:
    """Print a result of the library: its own summary, or its fields as JSON."""
    show_json(result) if as_json else console_on(sys.stdout).print(str(result), markup=False, soft_wrap=True)


def hide_progress_bars() -> None:
    """Hide the progress bars of transformers if stderr is not a terminal."""
    if not sys.stderr.isatty():
        settings: Any = importlib.import_module("transformers.utils.logging")
        settings.disable_progress_bar()


def show_table(columns: Sequence[Column], rows: Collection[Sequence[str]]) -> None:
    """Print a table."""
    _print(console_on(sys.stdout), table(columns, rows))


def show_heading(title: str, facts: Mapping[str, str]) -> None:
    """Print a title with facts below it. Empty facts are left out."""
    console = console_on(sys.stdout)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        if text:
            grid.add_row(Text(name), Text(text))
    _print(console, Text(title, style="bold"), Padding(grid, (0, 0, 0, 2), expand=False))


def show_lines(heading: str, lines: Collection[str]) -> None:
    """Print a heading with lines below it."""
    console = console_on(sys.stdout)
    padded = (Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False) for line in lines)
    _print(console, Text(heading, style="bold"), *padded)


def _print(console: Console, *parts: Any) -> None:
    """Print without the blanks that rich adds at the ends of lines."""
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def show_json(content: Any) -> None:
    """Print JSON, with null for non-finite numbers."""
    typer.echo(json.dumps(plain(content), indent=2))


class ErrorHandlingGroup(TyperGroup):
    """Runs commands, and prints their errors as one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse what was removed."""
        for word in (arg.partition("=")[0] for arg in args):
            if word in COMMAND_LINE and (word.startswith("-") or word == args[0]):
                print_message("error", f"{word} was removed in 0.5. {COMMAND_LINE[word]}", "bold red")
                raise typer.Exit(FAILED)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with _warnings_in_a_line():
                return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # of pydantic, which typer calls
            raise
        except (HRAError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # handled by the caller
                raise
            print_message("error", str(error), "bold red")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            print_message("interrupted", "nothing was written", "bold yellow")
            raise typer.Exit(INTERRUPTED) from error


def print_message(kind: str, text: str, style: str) -> None:
    """Print one line to stderr, without wrapping if it is not a terminal."""
    _print(console_on(sys.stderr), Text.assemble((kind, style), ": ", text))


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print hra_fx's warnings as one line."""
    default_showwarning = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if issubclass(category, HRAWarning):
            print_message("warning", str(message), "bold yellow")
        else:
            default_showwarning(message, category, filename, lineno, file or sys.stderr, line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=HRAWarning)
        warnings.showwarning = show
        yield
