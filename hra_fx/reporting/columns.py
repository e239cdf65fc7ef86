"""The columns and footnotes of a report, which are the same in terminals and notebooks.

In a terminal, rows that differ only in the indices of their blocks are one row: `layer.*.attention.self.query`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.filesize import decimal

from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer, SkippedParameter
from hra_fx.reporting.table import Column
from hra_fx.reporting.words import counted

# Limits of the footnotes. The data contain all reasons and names.
_REASONS = 6
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
        """The value of a row in the unit."""
        return float(getattr(row, self.field)) * self.factor

    def text(self, value: float) -> str:
        """Format a value with its unit, with one decimal and at least two digits; without a unit, with three decimals.

        >>> percent, angle = MEASURES["weight_change"], MEASURES["angle"]
        >>> angle.text(45), percent.text(0.00057), percent.text(0), angle.text(math.nan)
        ('45.0°', '0.00057%', '0%', 'unknown')
        """
        if math.isnan(value):
            return "unknown"
        if not self.unit:
            return f"{value:.3f}"
        if 0 < value < 1e-6:
            return f"{value:.0e}{self.unit}".replace("e-0", "e-")
        if 0 < value < 0.1:
            # No exponent, because it is hard to read in a column.
            return f"{value:.{1 - math.floor(math.log10(value))}f}".rstrip("0") + self.unit
        return f"{value:.1f}{self.unit}" if value else f"0{self.unit}"


MEASURES: Mapping[str, Measure] = {
    "weight_change": Measure("weight_change", "%", 100.0),
    "mean_angle": Measure("mean_angle", "°", math.degrees(1)),
    "angle": Measure("angle", "°", math.degrees(1)),
    "rotation": Measure("rotation", "", 1.0),
    "share": Measure("share", "%", 100.0),
}


def is_identity(rows: Collection[Row]) -> bool:
    """Whether all adapters of a report are the identity, as before training."""
    return bool(rows) and all(row.angles == () for row in rows)


@dataclass(frozen=True)
class Group(Generic[T]):
    """One line of a table: its name, with `*` for the indices in which its layers differ, and its rows."""

    name: str
    rows: tuple[T, ...]


def grouped(
    rows: Iterable[T], path: Callable[[T], str], same: Callable[[T], Hashable] = lambda row: None
) -> list[Group[T]]:
    """Group rows whose paths differ only in indices, and for which `same` is equal.

    >>> [group.name for group in grouped(["layers.0.out.0", "layers.1.out.0", "layers.1.mlp"], str)]
    ['layers.*.out.0', 'layers.1.mlp']
    """
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault((_INDEX.sub("*", path(row)), same(row)), []).append(row)
    return [Group(_starred(list(map(path, own))), tuple(own)) for own in found.values()]


def _starred(paths: Sequence[str]) -> str:
    """The paths of a group as one, with `*` where they differ."""
    levels = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(level[0] if len(set(level)) == 1 else "*" for level in levels)


def table_of(rows: Collection[Row], *, without: Collection[str] = ()) -> tuple[list[Column], list[list[str]]]:
    """Return the columns of a report except for those in `without`, and the texts of each row."""
    return _table([Group(row.path, (row,)) for row in rows], rows, without)


def grouped_table_of(rows: Collection[Row], *, without: Collection[str] = ()) -> tuple[list[Column], list[list[str]]]:
    """The columns for a terminal except for those in `without`; rows that differ only in block indices are one line."""
    groups = grouped(rows, lambda row: row.path, _same)
    is_clear = len({group.name for group in groups}) == len(groups)  # else the type tells lines apart
    columns, lines = _table(groups, rows, [*without, *(name for name in _DETAILS if name != "type" or is_clear)])
    for group, line in zip(groups, lines, strict=True):
        line[0] += f" x{len(group.rows)}" * (len(group.rows) > 1)
    return columns, lines


def _same(row: Row) -> Hashable:
    """What the rows of a line have in common. Values that could not be computed are in separate lines."""
    unknown = math.isnan(row.rotation), math.isnan(row.weight_change)
    return row.layer_type, row.adapter, row.active, row.d, row.r, unknown


def _table(
    groups: Collection[Group[Row]], rows: Collection[Row], without: Collection[str] = ()
) -> tuple[list[Column], list[list[str]]]:
    """Leave out also the name of the only adapter, a scale of 1, and `held` and `moved` if nothing is protected."""
    hidden = {*without} if len(adapters_of(rows)) > 1 else {"adapter", *without}
    if all(row.moved is None for row in rows):
        hidden |= {"held", "moved"}
    if all(row.scale == 1 for row in rows):
        hidden.add("scale")
    shown = [(column, text) for column, text in _COLUMNS if column.name not in hidden]
    return [column for column, _ in shown], [[text(group) for _, text in shown] for group in groups]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


def heading(rows: Collection[Row]) -> str:
    """The numbers of adapted layers and parameters, their memory, and the names of the adapters."""
    total = sum(row.parameters for row in rows)
    names = adapters_of(rows)
    layers = counted(len({row.path for row in rows}), "adapted layer")
    start = f"{layers}, {total:,} adapter parameters{_memory(rows)}"
    identity = ", not trained yet (identity)" * is_identity(rows)
    return f"{start}, adapter{'s' * (len(names) > 1)} {', '.join(names)}{identity}"


def _memory(rows: Collection[Row]) -> str:
    """The memory of the vectors, and the local memory in this process if they are sharded."""
    total, here = sum(row.bytes for row in rows), sum(row.bytes_here for row in rows)
    if not total:
        return ""
    if here == total:
        return f" ({decimal(total)})"
    parameters = sum(row.parameters * row.bytes_here // row.bytes for row in rows)
    return f" ({decimal(total)}; {parameters:,} and {decimal(here)} on this rank)"


def _held(group: Group[Row]) -> str:
    """The smallest share of the inputs."""
    values = [row.held for row in group.rows if row.held is not None]
    return f"{min(values):.1%}" if values else "-"


def _moved(group: Group[Row]) -> str:
    values = [row.moved for row in group.rows if row.moved is not None]
    return f"{max(values):.2%}" if values else "-"


def _measure(name: str) -> Callable[[Group[Row]], str]:
    """Format the smallest and the largest value of a measure, with its unit at the end."""
    measure = MEASURES[name]

    def text(group: Group[Row]) -> str:
        values = [measure.value(row) for row in group.rows]
        low, high = measure.text(min(values)), measure.text(max(values))
        return high if low == high else f"{low.removesuffix(measure.unit)} to {high}"

    return text


_COLUMNS: tuple[tuple[Column, Callable[[Group[Row]], str]], ...] = (
    (Column("layer", is_text=True), lambda group: group.name),
    (Column("type", is_text=True), lambda group: group.rows[0].layer_type),
    (Column("adapter", is_text=True), lambda group: group.rows[0].adapter + ", inactive" * (not group.rows[0].active)),
    (Column("d"), lambda group: str(group.rows[0].d)),
    (Column("r"), lambda group: str(group.rows[0].r)),
    (Column("scale"), lambda group: f"{group.rows[0].scale:g}"),
    (Column("params"), lambda group: f"{sum(row.parameters for row in group.rows):,}"),
    (Column("weight change"), _measure("weight_change")),
    (Column("held"), _held),
    (Column("moved"), _moved),
    (Column("mean angle"), _measure("mean_angle")),
    (Column("max angle"), _measure("angle")),
    (Column("|Q - I|"), _measure("rotation")),
    (Column("share of W"), _measure("share")),
)


#: The columns that a terminal has no room for.
_DETAILS = ("type", "d", "max angle", "|Q - I|", "share of W")


def footnotes(
    rows: Collection[Row],
    skipped: Collection[SkippedLayer],
    trained_in_full: Collection[str],
    parameters: Collection[SkippedParameter],
) -> dict[str, list[str]]:
    """Heading -> lines of the footnotes: which layers have no adapter and why (each reason once), possible errors."""
    lost, others = ([layer for layer in skipped if layer.targeted is wanted] for wanted in (True, False))
    share = sum(parameter.share for parameter in parameters)
    paths = [parameter.path for parameter in parameters]
    names = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
    experts = f"{_listed(paths)}: to adapt them, use target_parameters={names}"
    found = {
        f"Targeted, but not adapted: {counted(len(lost), 'layer')}": _by_reason(lost),
        f"Not adapted: 3-D parameters, {share:.1%} of the base model": [experts] if paths else [],
        "Trained in full:": [_listed(trained_in_full)] if trained_in_full else [],
        f"Not adapted: {counted(len(others), 'layer')}": _by_reason(others),
        "Q is not orthogonal:": _not_orthogonal(rows),
    }
    return {title: lines for title, lines in found.items() if lines}


def _by_reason(skipped: Collection[SkippedLayer]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.path)
    lines = [f"{_listed(paths)}: {reason}" for reason, paths in by_reason.items()]
    if len(lines) <= _REASONS:
        return lines
    rest = sum(map(len, list(by_reason.values())[_REASONS:]))
    return [*lines[:_REASONS], f"{rest:,} more layers, for {len(lines) - _REASONS} other reasons"]


def _listed(paths: Iterable[str]) -> str:
    names = grouped(paths, str)
    shown = [own.name + f" ({len(own.rows)})" * (len(own.rows) > 1) for own in names[:_NAMES]]
    rest = sum(len(own.rows) for own in names[_NAMES:])
    return ", ".join(shown) + f" and {rest:,} more" * (rest > 0)


def _not_orthogonal(rows: Collection[Row]) -> list[str]:
    # NaN means that the value could not be computed, which is not an error.
    worst = max(rows, key=lambda row: row.orthogonality if row.orthogonality > 0 else 0.0, default=None)
    if worst is None or not worst.orthogonality > _NOT_ORTHOGONAL:
        return []
    return [f"|Q'Q - I| is up to {worst.orthogonality:.0e}, at {worst.path} ({worst.adapter})"]
