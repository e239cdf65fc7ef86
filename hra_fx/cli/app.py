"""The application: its commands, and the options that come before one.

Neither torch nor transformers is imported before a command runs, so that help and completion come at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import hra_fx
from hra_fx.cli.commands.convert import EXAMPLES as OF_CONVERT, convert
from hra_fx.cli.commands.diff import EXAMPLES as OF_DIFF, diff
from hra_fx.cli.commands.fold import EXAMPLES as OF_FOLD, fold
from hra_fx.cli.commands.inspect import EXAMPLES as OF_INSPECT, inspect
from hra_fx.cli.commands.match import EXAMPLES as OF_MATCH, match
from hra_fx.cli.commands.unfold import EXAMPLES as OF_UNFOLD, unfold
from hra_fx.cli.commands.visualize import EXAMPLES as OF_VISUALIZE, visualize
from hra_fx.cli.telling import TellingGroup

_HELP = """Householder reflection adapters (HRA): look at them, fold them into checkpoints, draw them.

Exit codes: 0 done; 1 what was asked about is not so (two checkpoints differ, a configuration does not fit); 2 it could
not be done, for the reason on stderr; 130 stopped."""

_COMMANDS = (
    (inspect, OF_INSPECT),
    (match, OF_MATCH),
    (fold, OF_FOLD),
    (unfold, OF_UNFOLD),
    (diff, OF_DIFF),
    (convert, OF_CONVERT),
    (visualize, OF_VISUALIZE),
)
_SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="hra-fx",
    cls=TellingGroup,
    help=_HELP,
    no_args_is_help=True,
    context_settings=_SETTINGS,
    # What is not foreseen is a defect, of which a report needs the plain traceback.
    pretty_exceptions_enable=False,
)
for _command, _examples in _COMMANDS:
    # An empty line between two, for the help joins lines that have none between them.
    _epilog = "\n\n".join(["Examples:", *(f"  {example}" for example in _examples)])
    app.command(_command.__name__, epilog=_epilog, context_settings=_SETTINGS)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hra-fx {hra_fx.__version__}")
        raise typer.Exit


@app.callback()
def _before(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand behind a command too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    context.obj = debug


def main() -> None:
    """Run what the shell asks for, and leave with its exit code."""
    app()
