"""`report`: where the reflections are, in what region, and what they do; data first, a table on request."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from hra_fx import householder
from hra_fx.adapted import record_of, regions_of, require_sites, sites_of
from hra_fx.site import describe
from hra_fx.users_graph import shown_in

_UNLIMITED = 10_000

RegionKind = Literal["whole", "shared", "alone"]


@dataclass(frozen=True)
class Row:
    """One adapter at one layer.

    Attributes:
        path: the layer.
        region: `"whole"` (the model was captured whole), `"shared"` (a part of it was) or `"alone"` (the layer).
        region_path: the root of the region.
        region_sites: number of sites in the region.
        region_reason: why the region is not larger; empty for a whole model.
        site: kind and shape of the layer.
        on_weight: whether its weight is reflected where it is read, and not its input.
        adapter: name of the adapter.
        d: length of its vectors.
        r: number of its trained vectors.
        parameters: `d * r`.
        rotation: `|Q - I|_F`.
        angle: largest angle by which `Q` turns a plane, in radians; pi where it reflects.
        orthogonality: `|Q^T Q - I|_F` of `Q` in the precision in which the forward computes it.
    """

    path: str
    region: RegionKind
    region_path: str
    region_sites: int
    region_reason: str
    site: str
    on_weight: bool
    adapter: str
    d: int
    r: int
    parameters: int
    rotation: float
    angle: float
    orthogonality: float


@dataclass(frozen=True)
class Report:
    """The rows of a model; prints as a table.

    Attributes:
        rows: one for each adapter of each layer, in model order.
    """

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, ready for JSON or a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and below it each reason why a region is not larger, once."""
        tables = (_table(self, _SPARE[:dropped]) for dropped in range(len(_SPARE) + 1))
        wide = Console(width=_UNLIMITED)
        fitting = (table for table in tables if wide.measure(table).maximum <= options.max_width)
        yield next(fitting, _table(self, _SPARE))
        reasons = dict.fromkeys(row.region_reason for row in self.rows if row.region_reason)
        if reasons:
            yield Text("Why regions are not larger:", style="bold")
            yield from (Text(f"  {line}") for line in _condensed(list(reasons)))

    def __str__(self) -> str:
        """The table as text, as wide as it takes: nothing is cut off."""
        width = Console(width=_UNLIMITED).measure(_table(self)).maximum
        console = Console(width=max(100, width), no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """Describe every adapted layer of a transformed model.

    Args:
        model: a transformed model.

    Returns:
        A `Report`: rows as data, and a table when printed.

    Raises:
        AdapterError: the model has no reflections.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> row = report(model).rows[0]
        >>> row.path, row.region, row.d, row.r, row.rotation < 1e-6
        ('0', 'whole', 6, 2, True)
    """
    sites = require_sites(model)
    places = _places(model)
    shown = shown_in(model)
    record = record_of(model)
    alone = record.alone if record else {}
    rows: list[Row] = []
    for path, layer in sites.items():
        place = places.get(layer) or _Place("alone", path, 1, alone.get(path, ""))
        if path in shown:
            place = _Place("whole", "", len(shown), "")
        for name in layer.hra_u:
            turned = householder.turn(layer.hra_u.chain(name))
            d, r = layer.hra_u[name].shape
            rows.append(Row(path, *place, describe(layer), layer.hra_u.on_weight, name, d, r, d * r, *turned))
    return Report(tuple(rows))


class _Place(NamedTuple):
    """Where a layer runs, as the fields of a row tell."""

    region: RegionKind
    region_path: str
    region_sites: int
    region_reason: str


def _places(model: nn.Module) -> dict[nn.Module, _Place]:
    """The region of every layer that is in one; of a layer in several the first."""
    places: dict[nn.Module, _Place] = {}
    for path, module in regions_of(model).items():
        region = module._hra_region
        if region.sites <= sites_of(module).keys():
            place = _Place("shared" if path else "whole", path, len(region.sites), region.reason)
            for site in region.sites:
                places.setdefault(module.get_submodule(site), place)
    return places


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: row.path,
    "site": lambda row: row.site + ", on its weight" * row.on_weight,
    "region": lambda row: _region(row),
    "adapter": lambda row: row.adapter,
    "d": lambda row: str(row.d),
    "r": lambda row: str(row.r),
    "params": lambda row: f"{row.parameters:,}",
    "|Q - I|": lambda row: f"{row.rotation:.3f}",
    "angle": lambda row: f"{math.degrees(row.angle):.1f}°",
    "|Q'Q - I|": lambda row: f"{row.orthogonality:.0e}",
}
#: Columns that a narrow terminal does without, first to go first.
_SPARE = ("|Q'Q - I|", "site", "d", "region")


def _table(report: Report, without: Collection[str] = ()) -> Table:
    total = sum(row.parameters for row in report.rows)
    adapters = list(dict.fromkeys(row.adapter for row in report.rows))
    title = f"{len({row.path for row in report})} sites, {total:,} trained parameters, adapter {', '.join(adapters)}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = {name: show for name, show in _COLUMNS.items() if name not in without}
    if len(adapters) == 1:
        del columns["adapter"]
    for name in columns:
        words = name in ("layer", "site", "region", "adapter")
        table.add_column(name, overflow="fold", justify="left" if words else "right", no_wrap=not words)
    for row in report.rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table


def _region(row: Row) -> str:
    if row.region == "alone":
        return "alone"
    if row.region == "whole":
        return f"whole, {row.region_sites} sites"
    # The root of a region is a beginning of the layer's own path, and stands beside it.
    return f"…{row.region_path.rpartition('.')[2]}, {row.region_sites} sites"


def _condensed(reasons: list[str]) -> list[str]:
    """Reasons that differ only in a layer's number, once, with the number of times."""
    counted: dict[str, int] = {}
    for reason in reasons:
        key = re.sub(r"(?<=\.)\d+(?=[. ])", "*", reason)
        counted[key] = counted.get(key, 0) + 1
    return [f"{reason} ({count} times)" if count > 1 else reason for reason, count in counted.items()]
