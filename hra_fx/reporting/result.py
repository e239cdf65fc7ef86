"""The report of a model: its rows as data, and all its formats."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.padding import Padding
from rich.text import Text

from hra_fx.reporting.columns import grouped_table_of, heading, table_of
from hra_fx.reporting.footnotes import Footnote, footnotes
from hra_fx.reporting.plots import draw_comparison, draw_heatmap
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import SkippedLayer, SkippedParameter
from hra_fx.reporting.table import UNLIMITED, fit_table


@dataclass(frozen=True)
class Report(JupyterMixin):
    """The result of `hra_fx.report`. It is shown as a table, with one line for layers that repeat in each block.

    `rows`, `to_dicts()`, `to_json()` and `to_markdown()` contain the rows of all layers.

    Attributes:
        rows: one row for each adapter of each layer, in model order.
        skipped: the layers that could have an adapter but do not, with the reason, in model order.
        trained_in_full: paths of the layers that are trained in full: those in `modules_to_save`, and new heads.
        skipped_parameters: the 3-D parameters (experts) without an adapter, in model order.
    """

    rows: tuple[Row, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    trained_in_full: tuple[str, ...] = ()
    skipped_parameters: tuple[SkippedParameter, ...] = ()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for JSON or a data frame. The angles are a list."""
        return [dataclasses.asdict(row) | {"angles": list(row.angles)} for row in self.rows]

    def to_json(self, indent: int | None = None) -> str:
        """Return a JSON object with the fields of the report, and `null` for NaN.

        Args:
            indent: spaces for each level; `None` for one line.
        """
        content = {
            "rows": self.to_dicts(),
            "skipped": [dataclasses.asdict(layer) for layer in self.skipped],
            "trained_in_full": list(self.trained_in_full),
            "skipped_parameters": [dataclasses.asdict(parameter) for parameter in self.skipped_parameters],
        }
        return json.dumps(without_nan(content), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """Return the table of all layers in GitHub's Markdown, followed by the footnotes."""
        return as_markdown(self.rows, self._footnotes())

    def plot_heatmap(
        self, path: str | os.PathLike[str], heat: str | None = None, *, adapter: str | None = None
    ) -> Path:
        """Plot how much each layer is changed, with one row for each projection and one column for each block.

        Args:
            path: the file, ending in `.svg`, `.png` or `.pdf`; its folder must exist.
            heat: the field to show: `"weight_change"` (the default), `"mean_angle"`, `"angle"`, `"rotation"` or
                `"share"`.
            adapter: name of the adapter; `None` for the largest value among a layer's adapters.

        Returns:
            The path of the file.

        Raises:
            VisualizeError: unknown file extension, field or adapter, no such folder, or matplotlib is not installed.
        """
        return draw_heatmap(self.rows, path, heat, adapter)

    def plot_comparison(self, path: str | os.PathLike[str], first: str, second: str) -> Path:
        """Plot the mean and the largest angle of two adapters side by side, layer by layer.

        Args:
            path: the file, ending in `.svg`, `.png` or `.pdf`; its folder must exist.
            first: name of an adapter.
            second: name of another adapter.

        Returns:
            The path of the file.

        Raises:
            VisualizeError: unknown file extension or adapter, no such folder, or matplotlib is not installed.
        """
        return draw_comparison(self.rows, path, first, second)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table with as many columns as fit, and the footnotes."""
        yield Text(heading(self.rows), style="italic")
        yield fit_table(*grouped_table_of(self.rows), options.max_width)
        for footnote in self._footnotes():
            yield Text(footnote.heading, style="bold")
            yield from (Padding(Text(line), (0, 0, 0, 2)) for line in footnote.lines)

    def __str__(self) -> str:
        """Return the table and the footnotes as text. In a terminal, the table has as many columns as fit."""
        width = get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
        console = Console(width=width, no_color=True, highlight=False, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"

    __repr__ = __str__

    def _footnotes(self) -> list[Footnote]:
        return footnotes(self.rows, self.skipped, self.trained_in_full, self.skipped_parameters)


def without_nan(value: Any, text: Callable[[str], str] = str) -> Any:
    """Convert a value for JSON, which does not support NaN.

    Args:
        value: the value.
        text: applied to each string in the value.

    >>> without_nan({"a": (1.5, float("nan"))})
    {'a': [1.5, None]}
    """
    if isinstance(value, int):  # nearly all values of a page
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(entry, text) for name, entry in value.items()}
    return [without_nan(entry, text) for entry in value] if isinstance(value, (list, tuple)) else value


def as_markdown(rows: Collection[Row], footnotes: Collection[Footnote]) -> str:
    """Format a table in GitHub's Markdown, followed by the footnotes as lists."""
    columns, cells = table_of(rows)
    lines = [f"**{escaped(heading(rows))}**", ""]
    lines.append(_line([escaped(column.name) for column in columns]))
    lines.append(_line([":--" if column.is_text else "--:" for column in columns]))
    lines += [_line(list(map(escaped, row))) for row in cells]
    for footnote in footnotes:
        lines += ["", f"{escaped(footnote.heading)}", "", *(f"- {escaped(line)}" for line in footnote.lines)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    r"""Escape a text so that Markdown shows it literally, without emphasis, links, HTML or ends of cells.

    >>> escaped("a*b|<b>")
    'a\\*b\\|\\<b\\>'
    """
    # An underscore in a word does not have a special meaning, so it is not escaped.
    return re.sub(r"([\\`*\[\]<>|~&#!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
