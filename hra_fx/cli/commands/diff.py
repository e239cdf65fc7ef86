"""`hra-fx diff`."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.error_output import NO
from hra_fx.cli.options import Json, Quiet
from hra_fx.cli.screen import Column, count, show_heading, show_json, show_table

if TYPE_CHECKING:
    from hra_fx.cli.comparing import Comparison, Difference

EXAMPLES = (
    "hra-fx diff my-model folded",
    "hra-fx diff my-model restored --tolerance 0.01",
    "hra-fx diff one/model.safetensors other/model.safetensors --json",
)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint: a folder, or a safetensors file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Relative change of a tensor up to which it counts as equal.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which tensors of two checkpoints differ, and how far. The exit code is 1 where any does.

    "change" is |B - A| / |A|, "largest" that of one element, "lengths" how far a row's length changed. "turned" says
    that all rows (or columns) kept their lengths but for rounding, as a rotation does; "rounding", that no more changed
    than the last digit; "small", that lengths do not tell.
    """
    from hra_fx.cli.comparing import compare

    found = compare(a, b, tolerance, progress=not quiet)
    show_json(found) if as_json else _show(found)
    if found.differences:
        raise typer.Exit(NO)


def _show(found: Comparison) -> None:
    from hra_fx.reporting.columns import percent

    differences = found.differences
    total = found.equal + len(differences)
    counts = Counter(difference.how for difference in differences)
    # Of tensors that are near, nobody shall read that they are equal.
    beyond = f" by more than {percent(found.tolerance)}" if found.tolerance else ""
    if differences:
        title = f"{len(differences):,} of {count(total, 'tensor')} differ{beyond}"
    else:
        title = f"{count(total, 'tensor')}, none differs{beyond}" if beyond else f"{count(total, 'tensor')}, all equal"
    facts = {"A": str(found.a), "B": str(found.b), "how": ", ".join(f"{how} {n}" for how, n in counts.items())}
    show_heading(title, facts)
    columns = (
        Column("tensor", words=True),
        Column("shape", words=True, rank=3),
        Column("dtype", words=True, rank=2),
        Column("change"),
        Column("largest", rank=1),
        Column("lengths", rank=4),
        Column("how", words=True),
    )
    if differences:
        show_table(columns, [_row(difference) for difference in differences])


def _row(difference: Difference) -> tuple[str, ...]:
    from hra_fx.reporting.columns import percent

    shapes = ["x".join(map(str, shape)) for shape in difference.shapes if shape is not None]
    dtypes = [dtype for dtype in difference.dtypes if dtype]
    # A narrow terminal has no columns for these.
    said = {"shape": shapes, "dtype": dtypes}.get(difference.how)
    return (
        difference.name,
        " / ".join(dict.fromkeys(shapes)),
        " / ".join(dict.fromkeys(dtypes)),
        "" if math.isnan(difference.relative) else percent(difference.relative),
        "" if math.isnan(difference.largest) else f"{difference.largest:.2g}",
        "" if math.isnan(difference.lengths) else percent(difference.lengths),
        f"{difference.how} {' / '.join(said)}" if said else difference.how,
    )
