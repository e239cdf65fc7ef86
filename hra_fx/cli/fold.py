"""`hra-fx fold` and `hra-fx unfold`, which have the same arguments."""

from __future__ import annotations

from typing import Annotated

import typer

from hra_fx.cli.options import Columns, Json, Overwrite, Quiet, Rows
from hra_fx.cli.screen import show_result

FOLD_HELP = """Fold adapters into a checkpoint on disk. OUT is the base model with rotated weights.

Weights are read file by file, and all other files are copied unchanged. OUT is complete, or unchanged after an error.
"""
FOLD_EXAMPLES = (
    "hra-fx fold my-model my-adapter folded",
    "hra-fx fold my-model first second folded --verify",
    "hra-fx fold my-pipeline my-adapter folded --part unet",
)
UNFOLD_HELP = """Undo a fold on disk, up to rounding. BASE is the folder of the folded model.

Adapters with biases or modules to save raise an error, because the replaced values are lost.
"""
UNFOLD_EXAMPLES = (
    "hra-fx unfold folded my-adapter restored",
    "hra-fx unfold folded first second restored --verify",
)


def fold_or_unfold(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the model.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders of adapters, in the order of folding."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder.")],
    part: Annotated[
        str | None, typer.Option("--part", metavar="FOLDER", help="The part of a pipeline to change, such as unet.")
    ] = None,
    columns: Columns = None,
    rows: Rows = False,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Re-read the result; check that row norms and all other values are preserved."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the command that the user typed."""
    from hra_fx.checkpoint.disk.fold import fold_checkpoint, unfold_checkpoint

    report = (unfold_checkpoint if context.info_name == "unfold" else fold_checkpoint)(
        base,
        {part: adapters} if part else adapters,
        out,
        columns=[] if rows else columns or None,
        overwrite=overwrite,
        verify=verify,
        progress=not quiet,
    )
    show_result(report, as_json=as_json)
