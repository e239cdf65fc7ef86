"""What commands print: a report below its facts, or JSON; and errors and warnings as one line on stderr.

Only unexpected errors show a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeAlias

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from hra_fx.errors import HRAError, HRAWarning
from hra_fx.reporting.table import UNLIMITED
from hra_fx.reporting.words import plain

if TYPE_CHECKING:
    from hra_fx.reporting.report import Report

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
#: Exit code if a check failed.
CHECK_FAILED = 1
#: Exit code of errors.
FAILED = 2


def show(facts: Mapping[str, Any], found: Report, *, as_json: bool) -> None:
    """Print facts, those that have a value, and a report below them; or both as JSON."""
    if as_json:
        show_json({**facts, **plain(found)})
        return
    given = {name: value for name, value in facts.items() if value}
    width = max(map(len, given))
    _print(sys.stdout, *(Text(f"{name:{width}}  {_text(value)}") for name, value in given.items()), found)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)


def show_json(content: Any) -> None:
    """Print JSON, with null for non-finite numbers."""
    typer.echo(json.dumps(plain(content), indent=2))


def print_message(kind: str, text: str, style: str) -> None:
    """Print one line to stderr."""
    _print(sys.stderr, Text.assemble((kind, style), ": ", text))


def _print(stream: TextIO, *parts: Any) -> None:
    """Print without the blanks that rich adds at the ends of lines. Lines are not wrapped in a file or a pipe."""
    width = None if stream.isatty() or "COLUMNS" in os.environ or "FORCE_COLOR" in os.environ else UNLIMITED
    console = Console(file=stream, width=width, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


class ErrorHandlingGroup(TyperGroup):
    """Runs commands, and prints their errors as one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=HRAWarning)
            warnings.showwarning = lambda message, *_, **__: print_message("warning", str(message), "bold yellow")
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # handled by the caller
                raise
            except (HRAError, OSError) as error:
                print_message("error", str(error), "bold red")
                raise typer.Exit(FAILED) from error
            except Exception as error:
                if getattr(getattr(error, "param", None), "name", "") == "adapters":  # the last path was parsed as OUT
                    error.param_hint = "'ADAPTER' or 'OUT'"  # type: ignore[attr-defined]
                raise
