"""`hra-fx unfold`."""

from __future__ import annotations

from typing import Annotated

import typer

from hra_fx.cli.options import Columns, Json, Overwrite, Part, Quiet, Rows, Verify
from hra_fx.cli.screen import show_json, stdout

EXAMPLES = (
    "hra-fx unfold folded my-adapter restored",
    "hra-fx unfold folded first second restored --verify",
)


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

    report = unfold_checkpoint(
        folded,
        {part: adapters} if part else adapters,
        out,
        columns=[] if rows else columns or None,
        overwrite=overwrite,
        verify=verify,
        progress=not quiet,
    )
    show_json(report) if as_json else stdout().print(str(report), markup=False, soft_wrap=True)
