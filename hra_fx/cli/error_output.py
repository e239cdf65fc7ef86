"""Errors and warnings as one line on stderr, and exit codes. Only unexpected errors show a traceback."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from hra_fx.cli.screen import stderr
from hra_fx.errors import HRAError, HRAWarning

#: Exit code if a check failed.
CHECK_FAILED = 1
#: Exit code of errors.
FAILED = 2
#: Exit code of shells for a program stopped by Ctrl-C.
INTERRUPTED = 130
_DEBUG = "--debug"


class ErrorHandlingGroup(TyperGroup):
    """Runs commands, and prints their errors as one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept `--debug` in any place, since users append it to a command that has just failed."""
        before = [_DEBUG] if _DEBUG in args else []
        return super().parse_args(ctx, [*before, *(arg for arg in args if arg != _DEBUG)])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        debug = ctx.params["debug"]
        try:
            with _libraries_muted(enabled=not debug), _warnings_as_lines():
                return super().invoke(ctx)
        except (HRAError, OSError) as error:
            # A closed pipe is handled by the caller.
            if debug or isinstance(error, BrokenPipeError):
                raise
            print_message("error", _text(error), "bold red")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            print_message("interrupted", notes or "nothing was written", "bold yellow")
            raise typer.Exit(INTERRUPTED) from error


def print_message(kind: str, text: str, style: str) -> None:
    """Print one line to stderr, without wrapping if it is not a terminal."""
    stderr().print(Text.assemble((kind, style), ": ", text))


def _text(error: HRAError | OSError) -> str:
    if isinstance(error, HRAError) or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror or type(error).__name__}."


@contextlib.contextmanager
def _libraries_muted(*, enabled: bool) -> Iterator[None]:
    """Hide log messages of imported libraries, such as those about missing hardware."""
    before = logging.root.manager.disable
    if enabled:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print hra_fx warnings as one line; leave others alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=HRAWarning)
        default_showwarning = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if issubclass(category, HRAWarning):
                print_message("warning", str(message), "bold yellow")
            else:
                default_showwarning(message, category, filename, lineno, file or sys.stderr, line)

        warnings.showwarning = show
        yield
