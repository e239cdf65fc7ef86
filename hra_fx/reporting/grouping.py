"""Rows of a report that differ only in the indices of their blocks, as one: `layer.*.attention.self.query`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hra_fx.reporting.heat import with_unit
from hra_fx.reporting.row import Row

#: Degrees from which a range has no decimals.
_LARGE = 10
_INDEX = re.compile(r"(?<![^\s.])\d+(?=[. ])|(?<=\.)\d+(?=[. ]|$)")


@dataclass(frozen=True)
class Group:
    """One line of a table.

    Attributes:
        name: the path of its layer; with `*` for the indices in which its layers differ.
        rows: its rows, at least one.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """A row; type, adapter, `d` and `r` are the same for all."""
        return self.rows[0]

    def range(self, value: Callable[[Row], float], text: Callable[[float], str]) -> str:
        """The smallest and the largest value.

        Args:
            value: the value of a row.
            text: the text of a value, with its unit at the end.
        """
        values = [value(row) for row in self.rows]
        low, high = text(min(values)), text(max(values))
        return high if low == high else f"{low.rstrip('°%')} to {high}"

    def angles(self, value: Callable[[Row], float]) -> str:
        """The range of angles in degrees; without decimals if they are large, so that two columns fit a terminal."""
        values = [math.degrees(value(row)) for row in self.rows]
        if len(values) > 1 and min(values) >= _LARGE:
            return self.range(lambda row: math.degrees(value(row)), lambda angle: f"{angle:.0f}°")
        return self.range(lambda row: math.degrees(value(row)), lambda angle: with_unit(angle, "°"))


def starred(text: str) -> str:
    """A text with `*` for the indices of layers.

    >>> starred("model.layers.3.mlp.experts.0"), starred("layer1.conv2"), starred("0")
    ('model.layers.*.mlp.experts.*', 'layer1.conv2', '0')
    """
    return _INDEX.sub("*", text)


def single(rows: Collection[Row]) -> list[Group]:
    """Each row by itself."""
    return [Group(row.path, (row,)) for row in rows]


def grouped(rows: Collection[Row]) -> list[Group]:
    """Rows with the same type, rank and adapter, whose paths differ in indices only, as one. Rows with a value that
    could not be computed stay apart from the others."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        unknown = math.isnan(row.rotation), math.isnan(row.weight_change)
        same = starred(row.path), row.layer_type, row.adapter, row.active, row.d, row.r, *unknown
        found.setdefault(same, []).append(row)
    return [Group(starred(own[0].path) if len(own) > 1 else own[0].path, tuple(own)) for own in found.values()]


def common_parent(names: Sequence[str]) -> str:
    """The modules that all names begin with, up to the list that an index is of; `""` for a single name.

    >>> common_parent(["encoder.layer.*.query", "encoder.layer.*.value", "encoder.norm"])
    'encoder'
    """
    parts = [name.split(".") for name in names]
    length = 0
    while len(parts) > 1 and all(len(own) > length + 1 and own[length] == parts[0][length] for own in parts):
        if any(own[length + 1] == "*" for own in parts):
            break
        length += 1
    return ".".join(parts[0][:length]) if parts else ""
