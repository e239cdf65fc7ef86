"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Columns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME",
        help="A layer that stores its weight as (in, out), by the end of its path. Repeatable. Not needed for models "
        "with a config.json.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout.")]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists, after everything is written.")
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Rows: TypeAlias = Annotated[
    bool, typer.Option("--rows", help="Every weight is (out, in). Not needed for models with a config.json.")
]
