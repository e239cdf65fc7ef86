"""`hra-fx fold`."""

from __future__ import annotations

from typing import Annotated

import typer

from hra_fx.cli.options import Columns, Json, Overwrite, Part, Quiet, Rows, Verify
from hra_fx.cli.screen import show_json, stdout

EXAMPLES = (
    "hra-fx fold my-model my-adapter folded",
    "hra-fx fold my-model first second folded --verify",
    "hra-fx fold my-pipeline my-adapter folded --part unet",
)


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the base model.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders of adapters, in order of application.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder.")],
    part: Part = None,
    columns: Columns = None,
    rows: Rows = False,
    overwrite: Overwrite = False,
    verify: Verify = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into a checkpoint on disk. OUT is the base model with rotated weights.

    The model is never loaded: tensors are processed one by one, and all other files are copied unchanged. Repeat an
    interrupted command to resume it.
    """
    from hra_fx.checkpoint.disk.fold import fold_checkpoint

    report = fold_checkpoint(
        base,
        {part: adapters} if part else adapters,
        out,
        columns=[] if rows else columns or None,
        overwrite=overwrite,
        verify=verify,
        progress=not quiet,
    )
    show_json(report) if as_json else stdout().print(str(report), markup=False, soft_wrap=True)
