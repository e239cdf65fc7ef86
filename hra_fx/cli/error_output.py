"""Print errors and warnings as one line on stderr, and set exit codes. Only unexpected errors show a traceback."""

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

from hra_fx.cli.screen import console_on
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
        """Accept `--debug` anywhere, because users append it to a command that has failed."""
        before = [_DEBUG] if _DEBUG in args else []
        return super().parse_args(ctx, [*before, *(arg for arg in args if arg != _DEBUG)])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        debug = ctx.params["debug"]
        try:
            with _other_output(debug=debug):
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
    console_on(sys.stderr).print(Text.assemble((kind, style), ": ", text))


def _text(error: HRAError | OSError) -> str:
    if isinstance(error, HRAError) or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror or type(error).__name__}."


@contextlib.contextmanager
def _other_output(*, debug: bool) -> Iterator[None]:
    """Print hra_fx's warnings as one line, and hide log messages of libraries, for example about missing hardware."""
    before, default_showwarning = logging.root.manager.disable, warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if issubclass(category, HRAWarning):
            print_message("warning", str(message), "bold yellow")
        else:
            default_showwarning(message, category, filename, lineno, file or sys.stderr, line)

    logging.disable(before if debug else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=HRAWarning)
            warnings.showwarning = show
            yield
    finally:
        logging.disable(before)
