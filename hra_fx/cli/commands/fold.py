"""`hra-fx fold` and `hra-fx unfold`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.options import Columns, Json, Overwrite, Part, Quiet, Rows, Verify
from hra_fx.cli.screen import show_json, stdout

if TYPE_CHECKING:
    from hra_fx.checkpoint.disk.report import CheckpointReport

FOLD_EXAMPLES = (
    "hra-fx fold my-model my-adapter folded",
    "hra-fx fold my-model first second folded --verify",
    "hra-fx fold my-pipeline my-adapter folded --part unet",
)
UNFOLD_EXAMPLES = (
    "hra-fx unfold folded my-adapter restored",
    "hra-fx unfold folded first second restored --verify",
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

    _run(fold_checkpoint, base, adapters, out, part, columns, rows, overwrite, verify, quiet, as_json)


def unfold(
    folded: Annotated[str, typer.Argument(metavar="FOLDED", help="Folder of the folded model.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders of adapters, in the order in which they were folded."),
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
    """Undo a fold on disk, up to rounding.

    Adapters with biases or modules to save are refused, because the replaced values are lost.
    """
    from hra_fx.checkpoint.disk.fold import unfold_checkpoint

    _run(unfold_checkpoint, folded, adapters, out, part, columns, rows, overwrite, verify, quiet, as_json)


def _run(
    function: Callable[..., CheckpointReport],
    base: str,
    adapters: list[str],
    out: str,
    part: str | None,
    columns: list[str] | None,
    rows: bool,
    overwrite: bool,
    verify: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    report = function(
        base,
        {part: adapters} if part else adapters,
        out,
        columns=[] if rows else columns or None,
        overwrite=overwrite,
        verify=verify,
        progress=not quiet,
    )
    show_json(report) if as_json else stdout().print(str(report), markup=False, soft_wrap=True)
