"""`hra-fx diff`."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.error_output import CHECK_FAILED
from hra_fx.cli.options import Json, Quiet
from hra_fx.cli.screen import count, show_heading, show_json, show_table
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from hra_fx.cli.comparing import Comparison, Difference

EXAMPLES = (
    "hra-fx diff my-model folded",
    "hra-fx diff my-model restored --tolerance 0.01",
    "hra-fx diff one/model.safetensors other/model.safetensors --json",
)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint: a folder or a safetensors file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another checkpoint.")],
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Relative change up to which a tensor counts as equal.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which tensors of two checkpoints differ, and how much. The exit code is 1 if any differs.

    "change" is |B - A| / |A|, "largest" the largest change of an element, "lengths" that of a row norm. "rotated" means
    that all row (or column) norms are unchanged up to rounding; "rounding" that only the last digit changed; "small"
    that the change is too small to tell whether it is a rotation.
    """
    from hra_fx.cli.comparing import compare

    found = compare(a, b, tolerance, progress=not quiet)
    show_json(found) if as_json else _show(found)
    if found.differences:
        raise typer.Exit(CHECK_FAILED)


def _show(found: Comparison) -> None:
    from hra_fx.reporting.columns import percent

    differences = found.differences
    total = found.equal + len(differences)
    counts = Counter(difference.how for difference in differences)
    # With a tolerance, the tensors may not be equal.
    beyond = f" by more than {percent(found.tolerance)}" if found.tolerance else ""
    if differences:
        title = f"{len(differences):,} of {count(total, 'tensor')} differ{beyond}"
    else:
        title = f"{count(total, 'tensor')}, none differs{beyond}" if beyond else f"{count(total, 'tensor')}, all equal"
    facts = {"A": str(found.a), "B": str(found.b), "how": ", ".join(f"{how} {n}" for how, n in counts.items())}
    show_heading(title, facts)
    columns = (
        Column("tensor", is_text=True),
        Column("shape", is_text=True, priority=3),
        Column("dtype", is_text=True, priority=2),
        Column("change"),
        Column("largest", priority=1),
        Column("lengths", priority=4),
        Column("how", is_text=True),
    )
    if differences:
        show_table(columns, [_row(difference) for difference in differences])


def _row(difference: Difference) -> tuple[str, ...]:
    from hra_fx.reporting.columns import percent

    shapes = ["x".join(map(str, shape)) for shape in difference.shapes if shape is not None]
    dtypes = [dtype for dtype in difference.dtypes if dtype]
    # A narrow terminal does not show these columns.
    detail = {"shape": shapes, "dtype": dtypes}.get(difference.how)
    return (
        difference.name,
        " / ".join(dict.fromkeys(shapes)),
        " / ".join(dict.fromkeys(dtypes)),
        "" if math.isnan(difference.relative) else percent(difference.relative),
        "" if math.isnan(difference.largest) else f"{difference.largest:.2g}",
        "" if math.isnan(difference.lengths) else percent(difference.lengths),
        f"{difference.how} {' / '.join(detail)}" if detail else difference.how,
    )
