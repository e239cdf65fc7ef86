"""Options and arguments that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT where it is there, once all is written.")
]
Verify: TypeAlias = Annotated[
    bool, typer.Option("--verify", help="Read all again: rows have kept their lengths, all else is equal.")
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Part: TypeAlias = Annotated[
    str | None, typer.Option("--part", metavar="FOLDER", help="Which part of a pipeline it is for, such as unet.")
]
Columns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME",
        help="A layer, by the end of its path, that stores its weight as (in, out). May be given again. Not needed "
        "where config.json tells.",
    ),
]
Rows: TypeAlias = Annotated[
    bool, typer.Option("--rows", help="Every weight is (out, in). Not needed where config.json tells.")
]
