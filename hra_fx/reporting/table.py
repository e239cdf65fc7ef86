"""A report in a terminal: one table, which loses columns before it loses letters."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hra_fx.reporting.columns import columns_for, heading
from hra_fx.reporting.footnotes import remarks
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import Missed

_UNLIMITED = 10_000
#: Columns that a narrow terminal does without, first to go first.
_SPARE = ("site", "d", "region", "|Q - I|", "params", "turned", "r")


def in_terminal(rows: Collection[Row], missed: Collection[Missed], width: int) -> Iterator[RenderableType]:
    """The table with as many columns as fit, and the remarks below it."""
    tables = (_table(rows, _SPARE[:dropped]) for dropped in range(len(_SPARE) + 1))
    wide = Console(width=_UNLIMITED)
    fitting = (table for table in tables if wide.measure(table).maximum <= width)
    yield next(fitting, _table(rows, _SPARE))
    for remark in remarks(rows, missed):
        yield Text(remark.heading, style="bold")
        yield from (Padding(Text(line), (0, 0, 0, 2)) for line in remark.lines)


def as_text(rows: Collection[Row], missed: Collection[Missed]) -> str:
    """The same as plain text, as wide as it takes: nothing is cut off."""
    width = Console(width=_UNLIMITED).measure(_table(rows)).maximum
    console = Console(width=max(100, width), no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(_table(rows))
    lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
    for remark in remarks(rows, missed):
        lines += ["", remark.heading, *(f"  {line}" for line in remark.lines)]
    return "\n".join(lines) + "\n"


def _table(rows: Collection[Row], without: Collection[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(heading(rows)), title_justify="left")
    columns = columns_for(rows, without)
    for column in columns:
        justify = "left" if column.words else "right"
        table.add_column(Text(column.name), overflow="fold", justify=justify, no_wrap=not column.words)  # type: ignore[arg-type]
    for row in rows:
        # As Text, for names from a model may hold what rich takes for its markup.
        table.add_row(*(Text(column.text(row)) for column in columns))
    return table
