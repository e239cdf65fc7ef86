"""The columns of a report, the same for the terminal, Markdown and notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from hra_fx.checkpoint.disk.report import file_size
from hra_fx.reporting.heat import with_unit
from hra_fx.reporting.row import Row
from hra_fx.reporting.table import Column


def table_of(rows: Collection[Row]) -> tuple[list[Column], list[list[str]]]:
    """The columns of a report, and the texts of each row. Columns that say nothing are left out: the adapter's name if
    there is only one, and the graph if the model was not traced."""
    hidden = set() if len(adapters_of(rows)) > 1 else {"adapter"}
    if not is_traced(rows):
        hidden.add("graph")
    shown = [(column, text) for column, text in _COLUMNS if column.name not in hidden]
    return [column for column, _ in shown], [[text(row) for _, text in shown] for row in rows]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


def is_traced(rows: Collection[Row]) -> bool:
    """Whether the rows say by which graphs their layers are shown."""
    return any(row.graph is not None or row.graph_reason for row in rows)


def heading(rows: Collection[Row]) -> str:
    """The numbers of adapted layers and parameters, their memory, and the names of the adapters."""
    total = sum(row.parameters for row in rows)
    names = adapters_of(rows)
    layers = len({row.path for row in rows})
    start = f"{layers:,} adapted layer{'s' * (layers != 1)}, {total:,} adapter parameters{_memory(rows)}"
    identity = ", no layer is rotated yet" if rows and all(row.angles == () for row in rows) else ""
    return f"{start}, adapter{'s' * (len(names) > 1)} {', '.join(names)}{identity}"


def _memory(rows: Collection[Row]) -> str:
    """The memory of the vectors, and what this process holds of them if they are sharded."""
    total, here = sum(row.bytes for row in rows), sum(row.bytes_here for row in rows)
    if not total:
        return ""
    if here == total:
        return f" ({file_size(total)})"
    parameters = sum(row.parameters * row.bytes_here // row.bytes for row in rows)
    return f" ({file_size(total)}; {parameters:,} and {file_size(here)} on this rank)"


def degrees(angle: float) -> str:
    """An angle in radians as text in degrees, with at least two digits.

    >>> degrees(0.0), degrees(math.pi / 4), degrees(1e-5)
    ('0°', '45.0°', '0.00057°')
    """
    return with_unit(math.degrees(angle), "°")


def percent(share: float) -> str:
    """A share as text in percent, with at least two digits.

    >>> percent(0.0), percent(0.25), percent(0.0001)
    ('0%', '25.0%', '0.01%')
    """
    return with_unit(100 * share, "%")


def _graph(row: Row) -> str:
    if row.graph is None:
        return "none"
    # The root of a graph is a prefix of the layer's own path, which is in the same line.
    return f"…{row.graph.rpartition('.')[2]}" if row.graph else "whole model"


_COLUMNS: tuple[tuple[Column, Callable[[Row], str]], ...] = (
    (Column("layer", is_text=True), lambda row: row.path),
    (Column("type", is_text=True, priority=7), lambda row: row.layer_type),
    (Column("graph", is_text=True, priority=5), _graph),
    (Column("adapter", is_text=True), lambda row: row.adapter + ", inactive" * (not row.active)),
    (Column("d", priority=6), lambda row: str(row.d)),
    (Column("r", priority=1), lambda row: str(row.r)),
    (Column("params", priority=2), lambda row: f"{row.parameters:,}"),
    (Column("|Q - I|", priority=4), lambda row: f"{row.rotation:.3f}"),
    (Column("mean angle"), lambda row: degrees(row.mean_angle)),
    (Column("max angle"), lambda row: degrees(row.angle)),
    (Column("share of W", priority=3), lambda row: percent(row.share)),
)
