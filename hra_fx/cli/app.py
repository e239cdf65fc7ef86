"""The application: its commands and global options.

torch and transformers are not imported before a command runs, so that help and completion are fast.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.markup import escape

from hra_fx.cli.convert import (
    CONVERT_EXAMPLES,
    FOLD_EXAMPLES,
    FOLD_HELP,
    UNFOLD_EXAMPLES,
    UNFOLD_HELP,
    convert,
    fold_or_unfold,
)
from hra_fx.cli.inspect import INSPECT_EXAMPLES, inspect
from hra_fx.cli.models import MATCH_EXAMPLES, SCALE_EXAMPLES, VISUALIZE_EXAMPLES, match, scale, visualize
from hra_fx.cli.screen import ErrorHandlingGroup

_HELP = "Inspect, fold, convert and draw Householder reflection adapters (HRA)."
_EXIT_CODES = (
    "Exit codes: 0 success; 1 the configuration does not match the model; 2 error, see stderr; 130 interrupted."
)

#: Name, function, help and examples.
_COMMANDS = (
    ("inspect", inspect, inspect.__doc__, INSPECT_EXAMPLES),
    ("match", match, match.__doc__, MATCH_EXAMPLES),
    ("scale", scale, scale.__doc__, SCALE_EXAMPLES),
    ("fold", fold_or_unfold, FOLD_HELP, FOLD_EXAMPLES),
    ("unfold", fold_or_unfold, UNFOLD_HELP, UNFOLD_EXAMPLES),
    ("convert", convert, convert.__doc__, CONVERT_EXAMPLES),
    ("visualize", visualize, visualize.__doc__, VISUALIZE_EXAMPLES),
)
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def _unwrapped(text: str) -> str:
    """Join the lines of each paragraph, because the terminal wraps them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _list_examples(examples: Iterable[str]) -> str:
    """One example per paragraph, because older releases of typer join lines."""
    return "\n\n".join(["Examples:", *(f"  {escape(example)}" for example in examples)])


app = typer.Typer(
    name="hra-fx",
    cls=ErrorHandlingGroup,
    help=_HELP,
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    context_settings=_SETTINGS,
    # An unexpected error is a bug, and bug reports need the plain traceback.
    pretty_exceptions_enable=False,
)
for _name, _function, _help, _examples in _COMMANDS:
    app.command(_name, help=_unwrapped(_help or ""), epilog=_list_examples(_examples), context_settings=_SETTINGS)(
        _function
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        from hra_fx.version import VERSION

        typer.echo(f"hra-fx {VERSION}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Also allowed after a command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare the options: the group reads --debug, and --version has a callback."""


def run() -> None:
    """Run the command line, and exit with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a degree sign shows "?".
        sys.stdout.reconfigure(errors="replace")
    app()
