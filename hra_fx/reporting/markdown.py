"""A report as Markdown, for READMEs and issues."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from hra_fx.reporting.columns import columns_for, heading
from hra_fx.reporting.footnotes import remarks
from hra_fx.reporting.row import Row
from hra_fx.reporting.skipped_layers import Missed


def as_markdown(rows: Collection[Row], missed: Collection[Missed]) -> str:
    """A table in GitHub's Markdown, and the remarks below it as lists."""
    columns = columns_for(rows)
    lines = [f"**{escaped(heading(rows))}**", ""]
    lines.append(_line([escaped(column.name) for column in columns]))
    lines.append(_line([":--" if column.words else "--:" for column in columns]))
    lines += [_line([escaped(column.text(row)) for column in columns]) for row in rows]
    for remark in remarks(rows, missed):
        lines += ["", f"{escaped(remark.heading)}", "", *(f"- {escaped(line)}" for line in remark.lines)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    r"""A text that Markdown shows as it is: no emphasis, no link, no HTML, no end of a cell.

    >>> escaped("a*b|<b>")
    'a\\*b\\|\\<b\\>'
    """
    # An underline inside of a word is none, and stays readable.
    return re.sub(r"([\\`*\[\]<>|~&#!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
