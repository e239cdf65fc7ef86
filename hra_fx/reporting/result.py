"""The report of a model: its rows as data, and every form in which they are shown."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from hra_fx.reporting.markdown import as_markdown
from hra_fx.reporting.notebook import as_html
from hra_fx.reporting.plots.heat_strip import draw_heat_strip
from hra_fx.reporting.plots.two_adapters import draw_two_adapters
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import Missed
from hra_fx.reporting.table import as_text, in_terminal


@dataclass(frozen=True)
class Report:
    """The rows of a model; prints as a table, in a terminal and in a notebook.

    Attributes:
        rows: one for each adapter of each layer, in model order.
        missed: the layers that could carry reflections and carry none, with the reason, in model order.
    """

    rows: tuple[Row, ...]
    missed: tuple[Missed, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, ready for JSON or a data frame; the angles as a list."""
        return [dataclasses.asdict(row) | {"angles": list(row.angles)} for row in self.rows]

    def to_json(self, indent: int | None = None) -> str:
        """`{"rows": [...], "missed": [...]}` as JSON, with `null` for what is NaN.

        Args:
            indent: spaces for each level; `None` for one line.
        """
        content = {"rows": self.to_dicts(), "missed": [dataclasses.asdict(layer) for layer in self.missed]}
        return json.dumps(_without_nan(content), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown, and below it what is said of regions and of layers left out."""
        return as_markdown(self.rows, self.missed)

    def heat_strip(self, path: str | os.PathLike[str], heat: str = "mean_angle", *, adapter: str | None = None) -> Path:
        """Draw how far each layer is turned, as a strip: a row for each projection, a column for each block.

        Args:
            path: the file, ending in `.svg`, `.png` or `.pdf`; its folder must exist.
            heat: `"mean_angle"`, `"angle"`, `"rotation"` or `"share"`, the field that is shown.
            adapter: of which adapter; `None` for the largest value of all that a layer has.

        Returns:
            The path of the file.

        Raises:
            VisualizeError: another ending, field or adapter, no such folder, or matplotlib is not installed.
        """
        return draw_heat_strip(self.rows, path, heat, adapter)

    def compare(self, path: str | os.PathLike[str], first: str, second: str) -> Path:
        """Draw two adapters side by side: the mean and the largest angle of each at each layer.

        Args:
            path: the file, ending in `.svg`, `.png` or `.pdf`; its folder must exist.
            first: name of an adapter.
            second: name of another one.

        Returns:
            The path of the file.

        Raises:
            VisualizeError: another ending, no such adapter, no such folder, or matplotlib is not installed.
        """
        return draw_two_adapters(self.rows, path, first, second)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and below it each reason why a region is not larger and a layer was left out, once."""
        yield from in_terminal(self.rows, self.missed, options.max_width)

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return as_html(self.rows, self.missed)

    def __str__(self) -> str:
        """The table as text, as wide as it takes: nothing is cut off."""
        return as_text(self.rows, self.missed)

    __repr__ = __str__


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return [_without_nan(entry) for entry in value] if isinstance(value, list) else value
