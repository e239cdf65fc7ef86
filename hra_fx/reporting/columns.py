"""The columns and footnotes of a report, which are the same in terminals and notebooks.

In a terminal, rows that differ only in the indices of their blocks are one row: `layer.*.attention.self.query`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer
from hra_fx.reporting.table import Column
from hra_fx.reporting.words import counted

#: The limit of names in a line of a footnote.
_NAMES = 5
#: `|Q^T Q - I|` above this is an error, not rounding.
_NOT_ORTHOGONAL = 1e-3
#: A part of a path that is a number. A path that is only a number, as in `nn.Sequential`, is a name.
_INDEX = re.compile(r"(?<![^.])\d+(?=\.)|(?<=\.)\d+$")

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """A measure of how far a layer is rotated: a field of a row, times a factor, in a unit."""

    field: str
    unit: str
    factor: float

    def value(self, row: Row) -> float:
        """The value of a row in the unit; NaN if it is not known."""
        value = getattr(row, self.field)
        return math.nan if value is None else float(value) * self.factor

    def text(self, value: float) -> str:
        """Format a value with its unit: one decimal, or two digits if it is small.

        >>> percent, angle = MEASURES["weight_change"], MEASURES["angle"]
        >>> angle.text(45), percent.text(0.00057), percent.text(0), angle.text(math.nan)
        ('45.0°', '0.00057%', '0%', 'unknown')
        """
        if math.isnan(value):
            return "unknown"
        return (f"{value:.1f}" if value >= 0.1 else f"{value:.2g}") + self.unit


MEASURES: Mapping[str, Measure] = {
    measure.field: measure
    for measure in (
        Measure("weight_change", "%", 100.0),
        Measure("held", "%", 100.0),
        Measure("moved", "%", 100.0),
        Measure("mean_angle", "°", math.degrees(1)),
        Measure("angle", "°", math.degrees(1)),
    )
}


def is_identity(rows: Collection[Row]) -> bool:
    """Whether all adapters of a report are the identity, as before training."""
    return bool(rows) and all(row.angle == 0 for row in rows)


def grouped(
    rows: Iterable[T], path: Callable[[T], str], same: Callable[[T], Hashable] = lambda row: None
) -> list[tuple[str, list[T]]]:
    """Group rows whose paths differ only in indices, and for which `same` is equal: their name, with `*`, and the rows.

    >>> grouped(["layers.0.out.0", "layers.1.out.0", "layers.1.mlp"], str)
    [('layers.*.out.0', ['layers.0.out.0', 'layers.1.out.0']), ('layers.1.mlp', ['layers.1.mlp'])]
    """
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault((_INDEX.sub("*", path(row)), same(row)), []).append(row)
    return [(_starred(list(map(path, own))), own) for own in found.values()]


def _starred(paths: Sequence[str]) -> str:
    """The paths of a group as one, with `*` where they differ."""
    levels = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(level[0] if len(set(level)) == 1 else "*" for level in levels)


def table_of(rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    """Return the columns of a report, and the texts of each row."""
    return _table([(row.path, [row]) for row in rows], rows, ())


def grouped_table_of(rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    """The columns for which a terminal has room; rows that differ only in block indices are one line."""
    groups = [
        (name + f" x{len(own)}" * (len(own) > 1), own) for name, own in grouped(rows, lambda row: row.path, _same)
    ]
    return _table(groups, rows, _DETAILS)


def _same(row: Row) -> Hashable:
    """What the rows of a line have in common. Values that are not known are in separate lines."""
    unknown = [math.isnan(measure.value(row)) for measure in MEASURES.values()]
    return row.layer_type, row.adapter, row.active, row.d, row.r, row.scale, *unknown


def _table(
    groups: Collection[tuple[str, Sequence[Row]]], rows: Collection[Row], without: Collection[str]
) -> tuple[list[Column], list[list[str]]]:
    """Leave out also the name of the only adapter, a scale of 1, and measures that no row has."""
    hidden = {*without, "adapter"} if len(adapters_of(rows)) == 1 else {*without}
    if all(row.scale == 1 for row in rows):
        hidden.add("scale")
    hidden |= {name.replace("_", " ") for name in MEASURES if all(getattr(row, name) is None for row in rows)}
    shown = [(column, text) for column, text in _COLUMNS if column.name not in hidden]
    return [Column("layer", is_text=True), *(column for column, _ in shown)], [
        [name, *(text(own) for _, text in shown)] for name, own in groups
    ]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


def heading(rows: Collection[Row]) -> str:
    """The numbers of adapted layers and parameters, and the names of the adapters."""
    names = adapters_of(rows)
    layers = counted(len({row.path for row in rows}), "adapted layer")
    start = f"{layers}, {sum(row.parameters for row in rows):,} adapter parameters"
    identity = ", not trained yet (identity)" * is_identity(rows)
    return f"{start}, adapter{'s' * (len(names) > 1)} {', '.join(names)}{identity}"


def _measure(measure: Measure) -> Callable[[Sequence[Row]], str]:
    """Format the smallest and the largest value of a measure, with its unit at the end."""

    def text(rows: Sequence[Row]) -> str:
        values = [measure.value(row) for row in rows]
        low, high = measure.text(min(values)), measure.text(max(values))
        return high if low == high else f"{low.removesuffix(measure.unit)} to {high}"

    return text


#: The columns after the name of a line.
_COLUMNS: tuple[tuple[Column, Callable[[Sequence[Row]], str]], ...] = (
    (Column("type", is_text=True), lambda rows: rows[0].layer_type),
    (Column("adapter", is_text=True), lambda rows: rows[0].adapter + ", inactive" * (not rows[0].active)),
    (Column("d"), lambda rows: str(rows[0].d)),
    (Column("r"), lambda rows: str(rows[0].r)),
    (Column("scale"), lambda rows: f"{rows[0].scale:g}"),
    (Column("params"), lambda rows: f"{sum(row.parameters for row in rows):,}"),
    *((Column(name.replace("_", " ")), _measure(measure)) for name, measure in MEASURES.items()),
)
#: The columns that a terminal has no room for.
_DETAILS = ("type", "d", "angle")


def footnotes(
    rows: Collection[Row], skipped: Collection[SkippedLayer], trained_in_full: Collection[str]
) -> dict[str, list[str]]:
    """Heading -> lines of the footnotes: which layers have no adapter and why (each reason once), possible errors."""
    lost, others = ([layer for layer in skipped if layer.targeted is wanted] for wanted in (True, False))
    wrong = [row.path for row in rows if (row.orthogonality or 0) > _NOT_ORTHOGONAL]
    found = {
        f"Targeted, but not adapted: {counted(len(lost), 'layer')}": _by_reason(lost),
        "Trained in full:": [_listed(trained_in_full)] if trained_in_full else [],
        f"Not adapted: {counted(len(others), 'layer')}": _by_reason(others),
        f"Q is not orthogonal (|Q'Q - I| > {_NOT_ORTHOGONAL}):": [_listed(wrong)] if wrong else [],
    }
    return {title: lines for title, lines in found.items() if lines}


def _by_reason(skipped: Collection[SkippedLayer]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.path)
    return [f"{_listed(paths)}: {reason}" for reason, paths in by_reason.items()]


def _listed(paths: Iterable[str]) -> str:
    names = grouped(paths, str)
    shown = [name + f" ({len(own)})" * (len(own) > 1) for name, own in names[:_NAMES]]
    rest = sum(len(own) for _, own in names[_NAMES:])
    return ", ".join(shown) + f" and {rest:,} more" * (rest > 0)
