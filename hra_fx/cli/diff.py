"""`hra-fx diff`: compare two checkpoints tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hra_fx.cli.error_output import CHECK_FAILED
from hra_fx.cli.layers import natural
from hra_fx.cli.options import Json, Quiet
from hra_fx.cli.screen import count, show_heading, show_json, show_table
from hra_fx.errors import CheckpointError
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from hra_fx.checkpoint.disk.header import StoredTensor

EXAMPLES = (
    "hra-fx diff my-model folded",
    "hra-fx diff my-model restored --tolerance 0.01",
    "hra-fx diff one/model.safetensors other/model.safetensors --json",
)
_SAFE = ".safetensors"


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between the checkpoints.

    Attributes:
        name: its key, after its folder and a colon if there are several.
        how: see `Change.how`, or "shape", "only in A", "only in B".
        shapes: in `A` and `B`; `None` if missing.
        dtypes: names in the safetensors format.
        relative: see `Change`; NaN if the values cannot be compared, as for the next two.
        largest: see `Change`.
        lengths: see `Change`.
    """

    name: str
    how: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    relative: float = math.nan
    largest: float = math.nan
    lengths: float = math.nan


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
    compared = _compare(a, b, progress=not quiet)
    found = [each for each in compared if each.how != "equal" and not (tolerance and each.relative <= tolerance)]
    if as_json:
        equal = len(compared) - len(found)
        show_json({"a": a, "b": b, "tolerance": tolerance, "equal": equal, "differences": found})
    else:
        _show(a, b, found, len(compared), tolerance)
    if found:
        raise typer.Exit(CHECK_FAILED)


def _compare(a: Path, b: Path, *, progress: bool) -> list[Difference]:
    """All tensors of two checkpoints, sorted by name; equal ones have `how="equal"`."""
    from safetensors import safe_open

    from hra_fx.checkpoint.disk.progress_bar import bar

    ours, theirs = _tensors(a), _tensors(b)
    found = []
    total = sum(tensor.size for tensor in ours.values())
    with ExitStack() as files, bar("comparing", total, wanted=progress) as advance:

        @cache
        def opened(file: Path) -> Any:
            return files.enter_context(safe_open(file, framework="pt", device="cpu"))

        for name in sorted(ours.keys() | theirs.keys(), key=natural):
            one, other = ours.get(name), theirs.get(name)
            found.append(_difference(name, one, other, opened))
            advance(one.size if one else 0)
    return found


def _difference(name: str, one: StoredTensor | None, other: StoredTensor | None, opened: Any) -> Difference:
    from hra_fx.cli.tensor_change import change_of

    shapes = (one.shape if one else None, other.shape if other else None)
    dtypes = (one.dtype if one else None, other.dtype if other else None)
    if one is None or other is None:
        return Difference(name, "only in B" if one is None else "only in A", shapes, dtypes)
    if one.shape != other.shape:
        return Difference(name, "shape", shapes, dtypes)
    change = change_of(*(opened(stored.file).get_tensor(stored.name) for stored in (one, other)))
    # Equal values in another dtype still differ.
    how = "dtype" if change.how == "equal" and one.dtype != other.dtype else change.how
    return Difference(name, how, shapes, dtypes, change.relative, change.largest, change.lengths)


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of a folder with its subfolders."""
    from hra_fx.checkpoint.disk.header import read_header
    from hra_fx.checkpoint.disk.weight_files import weight_sets

    if path.is_file():
        return dict(read_header(path).tensors)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file.")
    tensors: dict[str, StoredTensor] = {}
    for folder in sorted({file.parent for file in path.rglob(f"*{_SAFE}")}) or [path]:
        sets = weight_sets(folder)
        place = folder.relative_to(path).as_posix()
        for found in sets:
            # Several sets in a folder are variants of one model with the same keys, such as model.fp16.safetensors.
            variant = Path(found.name).name.partition(_SAFE)[0] if len(sets) > 1 else ""
            prefix = "/".join(part for part in (place, variant) if part not in ("", "."))
            tensors |= {f"{prefix}:{name}" if prefix else name: tensor for name, tensor in found.tensors.items()}
    return tensors


def _show(a: Path, b: Path, differences: list[Difference], total: int, tolerance: float) -> None:
    from hra_fx.reporting.columns import percent

    # With a tolerance, the tensors may not be equal.
    beyond = f" by more than {percent(tolerance)}" if tolerance else ""
    if differences:
        title = f"{len(differences):,} of {count(total, 'tensor')} differ{beyond}"
    else:
        title = f"{count(total, 'tensor')}, none differs{beyond}" if beyond else f"{count(total, 'tensor')}, all equal"
    counts = Counter(difference.how for difference in differences)
    show_heading(title, {"A": str(a), "B": str(b), "how": ", ".join(f"{how} {n}" for how, n in counts.items())})
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
