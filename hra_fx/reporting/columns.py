"""The columns of a report, as every table of it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hra_fx.reporting.row import Row


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading.
        text: what it says of a row.
        words: whether that is text, and not a number.
    """

    name: str
    text: Callable[[Row], str]
    words: bool = False


def columns_for(rows: Collection[Row], without: Collection[str] = ()) -> list[Column]:
    """The columns that tell rows apart: the name of the adapter only where there are several.

    Args:
        rows: the rows.
        without: names of columns to leave out.
    """
    several = len(adapters_of(rows)) > 1
    return [column for column in _COLUMNS if column.name not in without and (several or column.name != "adapter")]


def adapters_of(rows: Collection[Row]) -> list[str]:
    """The names of the adapters, in the order of the rows."""
    return list(dict.fromkeys(row.adapter for row in rows))


def heading(rows: Collection[Row]) -> str:
    """How many sites and parameters, of which adapters."""
    total = sum(row.parameters for row in rows)
    names = adapters_of(rows)
    sites = _count(len({row.path for row in rows}), "site")
    return f"{sites}, {total:,} trained parameters, adapter{'s' * (len(names) > 1)} {', '.join(names)}"


def degrees(angle: float) -> str:
    """An angle in degrees, of two digits at least, for small ones matter at the beginning of a training.

    >>> degrees(0.0), degrees(math.pi / 4), degrees(1e-5)
    ('0°', '45.0°', '0.00057°')
    """
    value = math.degrees(angle)
    if 0 < value < 0.1:
        return f"{_plainly(value)}°"
    return f"{value:.1f}°" if value else "0°"


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.0), percent(0.25), percent(0.0001)
    ('0%', '25.0%', '0.01%')
    """
    value = 100 * share
    if 0 < value < 0.1:
        return f"{_plainly(value)}%"
    return f"{value:.1f}%" if value else "0%"


def _plainly(value: float) -> str:
    """Two digits of a small number; without an exponent, which no one reads in a column, unless it is tiny."""
    if value < 1e-6:
        return f"{value:.0e}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}".rstrip("0")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _region(row: Row) -> str:
    if row.region == "alone":
        return "alone"
    if row.region == "whole":
        return f"whole, {_count(row.region_sites, 'site')}"
    # The root of a region is a beginning of the layer's own path, and stands beside it.
    return f"…{row.region_path.rpartition('.')[2]}, {_count(row.region_sites, 'site')}"


_COLUMNS = (
    Column("layer", lambda row: row.path, words=True),
    Column("site", lambda row: row.site + ", on its weight" * row.on_weight, words=True),
    Column("region", _region, words=True),
    Column("adapter", lambda row: row.adapter + ", off" * (not row.active), words=True),
    Column("d", lambda row: str(row.d)),
    Column("r", lambda row: str(row.r)),
    Column("params", lambda row: f"{row.parameters:,}"),
    Column("|Q - I|", lambda row: f"{row.rotation:.3f}"),
    Column("mean angle", lambda row: degrees(row.mean_angle)),
    Column("largest", lambda row: degrees(row.angle)),
    Column("turned", lambda row: percent(row.share)),
)
