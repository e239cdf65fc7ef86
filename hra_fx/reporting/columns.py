"""The columns and footnotes of a report, which are the same in terminals, Markdown and notebooks.

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
from hra_fx.reporting.skipped_layers import SkippedLayer, SkippedParameter
from hra_fx.reporting.table import Column

# Limits of the footnotes. The data contain all reasons and names.
_REASONS = 6
_NAMES = 5
#: `|Q^T Q - I|` above this is an error, not rounding.
_NOT_ORTHOGONAL = 1e-3
#: From this number of degrees, a range is shown without decimals.
_LARGE = 10
_INDEX = re.compile(r"(?<![^\s.])\d+(?=[. ])|(?<=\.)\d+(?=[. ]|$)")


@dataclass(frozen=True)
class Group:
    """One line of a table: its name, with `*` for the indices in which its layers differ, and its rows."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The first row. Type, adapter, `d` and `r` are the same for all rows."""
        return self.rows[0]

    def range(self, value: Callable[[Row], float], text: Callable[[float], str]) -> str:
        """Format the smallest and the largest value, each with its unit at the end."""
        values = [value(row) for row in self.rows]
        low, high = text(min(values)), text(max(values))
        return high if low == high else f"{low.rstrip('°%')} to {high}"

    def angles(self, value: Callable[[Row], float]) -> str:
        """Format a range of angles in degrees, without decimals if they are large, so that columns fit a terminal."""
        is_large = len(self.rows) > 1 and math.degrees(min(map(value, self.rows))) >= _LARGE
        return self.range(value, (lambda angle: f"{math.degrees(angle):.0f}°") if is_large else degrees)


def starred(text: str) -> str:
    """Replace the indices of layers in a text with `*`.

    >>> starred("model.layers.3.mlp.experts.0"), starred("layer1.conv2"), starred("0")
    ('model.layers.*.mlp.experts.*', 'layer1.conv2', '0')
    """
    return _INDEX.sub("*", text)


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
    return _table([Group(row.path, (row,)) for row in rows], rows)


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
    if all(row.graph is None and not row.graph_reason for row in rows):
        hidden.add("graph")
    shown = [(column, text) for column, text in _COLUMNS if column.name not in hidden]
    return [column for column, _ in shown], [[text(group) for _, text in shown] for group in groups]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


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
    # The root of a graph is a prefix of the layer's path, which is in the same line, so only its end is shown.
    roots = dict.fromkeys(row.graph for row in group.rows)
    names = {None: "none", "": "whole model"}
    return ", ".join(dict.fromkeys(names.get(root) or f"…{str(root).rpartition('.')[2]}" for root in roots))


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


def footnotes(
    rows: Collection[Row],
    skipped: Collection[SkippedLayer],
    trained_in_full: Collection[str],
    parameters: Collection[SkippedParameter],
) -> dict[str, list[str]]:
    """Heading -> lines of the footnotes: which layers have no adapter and why (each reason once), possible errors."""
    trained = [_listed(_counted(trained_in_full))] if trained_in_full else []
    lost, others = ([layer for layer in skipped if layer.targeted is wanted] for wanted in (True, False))
    share = sum(parameter.share for parameter in parameters)
    found = {
        f"Targeted, but not adapted: {_layers(lost)}": _by_reason(lost),
        f"Not adapted: 3-D parameters, {share:.1%} of the base model": _experts(parameters),
        "Not traced as one graph:": _untraced(rows),
        "Trained in full:": trained,
        f"Not adapted: {_layers(others)}": _by_reason(others),
        "Q is not orthogonal:": _not_orthogonal(rows),
    }
    return {title: lines for title, lines in found.items() if lines}


def _layers(layers: Collection[SkippedLayer]) -> str:
    return f"{len(layers):,} layer{'s' * (len(layers) != 1)}"


def _experts(parameters: Collection[SkippedParameter]) -> list[str]:
    counted = _counted([parameter.path for parameter in parameters])
    names = list(dict.fromkeys(".".join(parameter.path.split(".")[-2:]) for parameter in parameters))
    return [f"{_listed(counted)}: to adapt them, use target_parameters={names}"] if parameters else []


def _untraced(rows: Collection[Row]) -> list[str]:
    counted = _counted(dict.fromkeys(row.graph_reason for row in rows if row.graph_reason))
    return [f"{reason} ({count} times)" if count > 1 else reason for reason, count in counted.items()]


def _by_reason(skipped: Collection[SkippedLayer]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.path)
    lines = [f"{_listed(_counted(paths))}: {reason}" for reason, paths in by_reason.items()]
    if len(lines) <= _REASONS:
        return lines
    rest = sum(map(len, list(by_reason.values())[_REASONS:]))
    return [*lines[:_REASONS], f"{rest:,} more layers, for {len(lines) - _REASONS} other reasons"]


def _counted(texts: Collection[str]) -> dict[str, int]:
    """Count texts. Texts that differ only in the indices of layers are counted as one text with `*`."""
    same: dict[str, list[str]] = {}
    for text in texts:
        same.setdefault(starred(text), []).append(text)
    return {key if len(found) > 1 else found[0]: len(found) for key, found in same.items()}


def _listed(names: dict[str, int]) -> str:
    shown = [f"{name} ({count})" if count > 1 else name for name, count in names.items()]
    rest = sum(list(names.values())[_NAMES:])
    return ", ".join(shown[:_NAMES]) + f" and {rest:,} more" * (rest > 0)


def _not_orthogonal(rows: Collection[Row]) -> list[str]:
    wrong = [row for row in rows if row.orthogonality > _NOT_ORTHOGONAL]
    if not wrong:
        return []
    worst = max(wrong, key=lambda row: row.orthogonality)
    return [f"|Q'Q - I| is up to {worst.orthogonality:.0e}, at {worst.path} ({worst.adapter})"]
