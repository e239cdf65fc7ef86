"""What a user is told where something goes wrong: one line on stderr and an exit code; tracebacks are for defects."""

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

from hra_fx.cli.cli_messages import for_a_shell
from hra_fx.cli.screen import stderr
from hra_fx.errors import HRAError, HRAWarning

#: What was asked about is not so.
NO = 1
#: It could not be done.
FAILED = 2
#: What shells give for a program that Ctrl-C stopped.
STOPPED = 130
_DEBUG = "--debug"


class TellingGroup(TyperGroup):
    """The commands, whose errors become lines."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` from wherever it stands: one adds it to the end of what has just failed."""
        before = [_DEBUG] if _DEBUG in args else []
        return super().parse_args(ctx, [*before, *(arg for arg in args if arg != _DEBUG)])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        debug = ctx.params["debug"]
        try:
            with _quiet_libraries(wanted=not debug), _warnings_as_lines():
                return super().invoke(ctx)
        except (HRAError, OSError) as error:
            # A pipe that nobody reads any more is closed in silence, by who called.
            if debug or isinstance(error, BrokenPipeError):
                raise
            tell("error", for_a_shell(_words(error)), "bold red")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            tell("stopped", " ".join(getattr(error, "__notes__", [])) or "nothing was finished", "bold yellow")
            raise typer.Exit(STOPPED) from error


def tell(kind: str, words: str, style: str) -> None:
    """One line on stderr, as long as it is where that is no terminal."""
    stderr().print(Text.assemble((kind, style), ": ", words))


def _words(error: HRAError | OSError) -> str:
    if isinstance(error, HRAError) or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror or type(error).__name__}."


@contextlib.contextmanager
def _quiet_libraries(*, wanted: bool) -> Iterator[None]:
    """Without what libraries log when they are imported, of binaries for hardware that is not here."""
    before = logging.root.manager.disable
    if wanted:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings of ours as lines; those of other libraries go their way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=HRAWarning)
        theirs = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if issubclass(category, HRAWarning):
                tell("warning", for_a_shell(str(message)), "bold yellow")
            else:
                theirs(message, category, filename, lineno, file or sys.stderr, line)

        warnings.showwarning = show
        yield
