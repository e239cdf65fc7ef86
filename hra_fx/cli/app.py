"""The application: its commands, and the options that come before one.

Neither torch nor transformers is imported before a command runs, so that help and completion come at once.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.markup import escape

from hra_fx.cli.commands.convert import EXAMPLES as OF_CONVERT, convert
from hra_fx.cli.commands.diff import EXAMPLES as OF_DIFF, diff
from hra_fx.cli.commands.fold import EXAMPLES as OF_FOLD, fold
from hra_fx.cli.commands.inspect import EXAMPLES as OF_INSPECT, inspect
from hra_fx.cli.commands.match import EXAMPLES as OF_MATCH, match
from hra_fx.cli.commands.unfold import EXAMPLES as OF_UNFOLD, unfold
from hra_fx.cli.commands.visualize import EXAMPLES as OF_VISUALIZE, visualize
from hra_fx.cli.error_output import TellingGroup

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


def _flowing(text: str) -> str:
    """Paragraphs that a terminal breaks, of lines as long as those of a file."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _listed(examples: Iterable[str]) -> str:
    """Examples below each other: older releases of typer join lines that have no empty one between them."""
    return "\n\n".join(["Examples:", *(f"  {escape(example)}" for example in examples)])


app = typer.Typer(
    name="hra-fx",
    cls=TellingGroup,
    help=_flowing(_HELP),
    no_args_is_help=True,
    context_settings=_SETTINGS,
    # What is not foreseen is a defect, of which a report needs the plain traceback.
    pretty_exceptions_enable=False,
)
for _command, _examples in _COMMANDS:
    app.command(
        _command.__name__, help=_flowing(_command.__doc__ or ""), epilog=_listed(_examples), context_settings=_SETTINGS
    )(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hra-fx {version('hra-fx')}")
        raise typer.Exit


@app.callback()
def _before(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand behind a command too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Nothing: the group reads the one, and the other answers by itself."""


def run() -> None:
    """Run what the shell asks for, and leave with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no sign for degrees shows another one, and the rest.
        sys.stdout.reconfigure(errors="replace")
    app()
