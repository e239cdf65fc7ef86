"""The application: its commands and global options.

torch and transformers are not imported before a command runs, so that help and completion are fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

import typer

from hra_fx.cli.inspect import inspect
from hra_fx.cli.match import match
from hra_fx.cli.screen import ErrorHandlingGroup
from hra_fx.cli.write import convert, fold
from hra_fx.version import VERSION

#: Command -> an example.
_COMMANDS: dict[Callable[..., None], str] = {
    inspect: "hra-fx inspect my-adapter",
    match: "hra-fx match my-model --target q_proj --target v_proj --layers 0-3,7",
    fold: "hra-fx fold my-model first second folded",
    convert: "hra-fx convert my-adapter my-lora --to lora --base my-model",
}
_SETTINGS = {"help_option_names": ["-h", "--help"]}


app = typer.Typer(
    name="hra-fx",
    cls=ErrorHandlingGroup,
    help="Inspect, fold and convert Householder reflection adapters (HRA).",
    epilog="Exit codes: 0 success; 1 the configuration does not match the model; 2 error, see stderr; 130 interrupted.",
    no_args_is_help=True,
    context_settings=_SETTINGS,
    # An unexpected error is a bug, and bug reports need the plain traceback.
    pretty_exceptions_enable=False,
)
for _command, _example in _COMMANDS.items():
    # A terminal wraps the lines of a paragraph.
    _help = "\n\n".join(" ".join(paragraph.split()) for paragraph in (_command.__doc__ or "").split("\n\n"))
    app.command(_command.__name__, help=_help, epilog=f"Example: {_example}", context_settings=_SETTINGS)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hra-fx {VERSION}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare the options: --version has a callback."""


def run() -> None:
    """Run the command line, and exit with its exit code."""
    logging.disable(logging.WARNING)  # messages of libraries, for example about missing hardware
    app()
