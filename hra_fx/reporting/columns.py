"""The columns of a report, which are the same in terminals, Markdown and notebooks.

In a terminal, rows that differ only in the indices of their blocks are one row: `layer.*.attention.self.query`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from rich.filesize import decimal

from hra_fx.reporting.heat import is_identity, with_unit
from hra_fx.reporting.row import Row
from hra_fx.reporting.table import Column

#: From this number of degrees, a range is shown without decimals.
_LARGE = 10
_INDEX = re.compile(r"(?<![^\s.])\d+(?=[. ])|(?<=\.)\d+(?=[. ]|$)")


@dataclass(frozen=True)
class Group:
    """One line of a table.

    Attributes:
        name: the path of the layer, with `*` for the indices in which the layers of the group differ.
        rows: the rows of the group, at least one.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The first row. Type, adapter, `d` and `r` are the same for all rows."""
        return self.rows[0]

    def range(self, value: Callable[[Row], float], text: Callable[[float], str]) -> str:
        """Format the smallest and the largest value.

        Args:
            value: the value of a row.
            text: the text of a value, with its unit at the end.
        """
        values = [value(row) for row in self.rows]
        low, high = text(min(values)), text(max(values))
        return high if low == high else f"{low.rstrip('°%')} to {high}"

    def angles(self, value: Callable[[Row], float]) -> str:
        """Format a range of angles in degrees, without decimals if they are large, so that columns fit a terminal."""
        values = [math.degrees(value(row)) for row in self.rows]
        if len(values) > 1 and min(values) >= _LARGE:
            return self.range(lambda row: math.degrees(value(row)), lambda angle: f"{angle:.0f}°")
        return self.range(lambda row: math.degrees(value(row)), lambda angle: with_unit(angle, "°"))


def starred(text: str) -> str:
    """Replace the indices of layers in a text with `*`.

    >>> starred("model.layers.3.mlp.experts.0"), starred("layer1.conv2"), starred("0")
    ('model.layers.*.mlp.experts.*', 'layer1.conv2', '0')
    """
    return _INDEX.sub("*", text)


def single(rows: Collection[Row]) -> list[Group]:
    """One group for each row."""
    return [Group(row.path, (row,)) for row in rows]


def grouped(rows: Collection[Row]) -> list[Group]:
    """Group rows with the same type, rank and adapter and with paths that differ only in indices.

    Rows with a value that could not be computed are in separate groups.
    """
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        unknown = math.isnan(row.rotation), math.isnan(row.weight_change)
        same = starred(row.path), row.layer_type, row.adapter, row.active, row.d, row.r, *unknown
        found.setdefault(same, []).append(row)
    return [Group(starred(own[0].path) if len(own) > 1 else own[0].path, tuple(own)) for own in found.values()]


def common_parent(names: Sequence[str]) -> str:
    """The common path prefix of all names, up to the list of blocks; `""` for a single name.

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


def table_of(rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    """Return the columns of a report, and the texts of each row.

    Unnecessary columns are left out: the adapter's name if there is only one, and the graph if the model was not
    traced.
    """
    return _table(single(rows), rows)


def grouped_table_of(rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    """Like `table_of`, for a terminal: one line for rows that differ only in the indices of their blocks."""
    groups = grouped(rows)
    columns, lines = _table(groups, rows)
    parent = common_parent([group.name for group in groups])
    if parent:
        columns[0] = replace(columns[0], name=f"layer (in {parent})")
    for group, line in zip(groups, lines, strict=True):
        line[0] = line[0].removeprefix(f"{parent}.") + f" x{len(group.rows)}" * (len(group.rows) > 1)
    return columns, lines


def _table(groups: Collection[Group], rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    hidden = set() if len(adapters_of(rows)) > 1 else {"adapter"}
    if not is_traced(rows):
        hidden.add("graph")
    shown = [(column, text) for column, text in _COLUMNS if column.name not in hidden]
    return [column for column, _ in shown], [[text(group) for _, text in shown] for group in groups]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


def is_traced(rows: Collection[Row]) -> bool:
    """Whether the rows contain the graphs of their layers."""
    return any(row.graph is not None or row.graph_reason for row in rows)


def heading(rows: Collection[Row]) -> str:
    """The numbers of adapted layers and parameters, their memory, and the names of the adapters."""
    total = sum(row.parameters for row in rows)
    names = adapters_of(rows)
    layers = len({row.path for row in rows})
    start = f"{layers:,} adapted layer{'s' * (layers != 1)}, {total:,} adapter parameters{_memory(rows)}"
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


def degrees(angle: float) -> str:
    """Format an angle in radians in degrees, with at least two digits.

    >>> degrees(0.0), degrees(math.pi / 4), degrees(1e-5)
    ('0°', '45.0°', '0.00057°')
    """
    return with_unit(math.degrees(angle), "°")


def percent(share: float) -> str:
    """Format a share in percent, with at least two digits.

    >>> percent(0.0), percent(0.25), percent(0.0001)
    ('0%', '25.0%', '0.01%')
    """
    return with_unit(100 * share, "%")


def _graph(group: Group) -> str:
    return ", ".join(dict.fromkeys(map(_graph_of, group.rows)))


def _graph_of(row: Row) -> str:
    if row.graph is None:
        return "none"
    # The root of a graph is a prefix of the layer's path, which is in the same line.
    return f"…{row.graph.rpartition('.')[2]}" if row.graph else "whole model"


_COLUMNS: tuple[tuple[Column, Callable[[Group], str]], ...] = (
    (Column("layer", is_text=True), lambda group: group.name),
    (Column("type", is_text=True, priority=8), lambda group: group.first.layer_type),
    (Column("graph", is_text=True, priority=6), _graph),
    (Column("adapter", is_text=True), lambda group: group.first.adapter + ", inactive" * (not group.first.active)),
    (Column("d", priority=7), lambda group: str(group.first.d)),
    (Column("r"), lambda group: str(group.first.r)),
    (Column("params", priority=1), lambda group: f"{sum(row.parameters for row in group.rows):,}"),
    (Column("weight change"), lambda group: group.range(lambda row: row.weight_change, percent)),
    (Column("mean angle", priority=2), lambda group: group.angles(lambda row: row.mean_angle)),
    (Column("max angle", priority=3), lambda group: group.angles(lambda row: row.angle)),
    (Column("|Q - I|", priority=5), lambda group: group.range(lambda row: row.rotation, "{:.3f}".format)),
    (Column("share of W", priority=4), lambda group: group.range(lambda row: row.share, percent)),
)
