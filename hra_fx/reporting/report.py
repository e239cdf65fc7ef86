"""`report`: describe what each adapter does at each layer, and list layers without an adapter; and its result."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.padding import Padding
from rich.text import Text
from torch import nn

from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.target import describe, weight_place
from hra_fx.model.state import get_state, require_adapted_layers, unwrap
from hra_fx.reporting.columns import footnotes, grouped_table_of, heading
from hra_fx.reporting.row import Row, chain_of, measured_fields, moved, weight_rows
from hra_fx.reporting.skipped_layers import SkippedLayer, not_adapted
from hra_fx.reporting.table import UNLIMITED, table
from hra_fx.reporting.words import plain


@dataclass(frozen=True)
class Report(JupyterMixin):
    """The result of `hra_fx.report`. It is shown as a table, with one line for layers that repeat in each block.

    `rows`, `to_dicts()` and `to_json()` contain the rows of all layers.

    Attributes:
        rows: one row for each adapter of each layer, in model order.
        skipped: the layers and 3-D parameters that could have an adapter but do not, with the reason.
        trained_in_full: paths of the layers that are trained in full: those in `modules_to_save`, and new heads.
    """

    rows: tuple[Row, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    trained_in_full: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for JSON or a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_json(self, indent: int | None = None) -> str:
        """Return a JSON object with the fields of the report, and `null` for NaN.

        Args:
            indent: spaces for each level; `None` for one line.
        """
        return json.dumps(plain(self), indent=indent)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table and the footnotes."""
        yield Text(heading(self.rows), style="italic")
        yield table(*grouped_table_of(self.rows))
        for title, lines in self.footnotes().items():
            yield Text(title, style="bold")
            yield from (Padding(Text(line), (0, 0, 0, 2)) for line in lines)

    def __str__(self) -> str:
        """Return the table and the footnotes as text."""
        width = get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
        console = Console(width=width, no_color=True, highlight=False, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"

    __repr__ = __str__

    def footnotes(self) -> dict[str, list[str]]:
        """Return what is below the table: heading -> lines."""
        return footnotes(self.rows, self.skipped, self.trained_in_full)


def report(model: nn.Module) -> Report:
    """Describe what each adapter does at each layer, and list the layers and 3-D parameters without an adapter.

    The angles are computed from matrices of size `r x r`, and the change of the weight from one product of the weight
    with a thin matrix, so no `d x d` matrix is created.

    Args:
        model: a transformed model.

    Returns:
        A `Report`. It contains the rows as data, and printing it shows a table.

    Raises:
        AdapterError: the model has no adapters.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), HRAConfig(r=2, target_modules=["0"]))
        >>> row = report(model).rows[0]
        >>> row.path, row.layer_type, row.d, row.r, row.angle
        ('0', 'Linear 6->8', 6, 2, 0.0)
    """
    model = unwrap(model)
    return Report(_rows(model), *not_adapted(model))


def _rows(model: nn.Module) -> tuple[Row, ...]:
    layers, state = require_adapted_layers(model), get_state(model)
    rows: list[Row] = []
    for path, layer in layers.items():
        reflection = layer.hra_u
        with loaded(weight_place(layer)[0]):
            weight = weight_rows(layer)
        for name in reflection:
            active = name in (state.active if state else reflection.active)
            d, r = reflection.width, reflection.specs[name].r
            with loaded(reflection):
                chain = chain_of(layer, name)
                measured: dict[str, Any] = measured_fields(chain, weight)
                measured["moved"] = moved(reflection.kept(name), chain)
            measured |= {"held": reflection.shares.get(name), "scale": reflection.scales.get(name, 1.0)}
            parameters = math.prod(reflection.vectors_shape(r))
            rows.append(Row(path, describe(layer), name, active, d, r, parameters, **measured))
    return tuple(rows)
