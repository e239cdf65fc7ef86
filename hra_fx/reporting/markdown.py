"""A report as Markdown, for READMEs and issues."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from hra_fx.reporting.columns import heading, table_of
from hra_fx.reporting.footnotes import Footnote
from hra_fx.reporting.row import Row


def as_markdown(rows: Collection[Row], footnotes: Collection[Footnote]) -> str:
    """A table in GitHub's Markdown, and the footnotes below it as lists."""
    columns, cells = table_of(rows)
    lines = [f"**{escaped(heading(rows))}**", ""]
    lines.append(_line([escaped(column.name) for column in columns]))
    lines.append(_line([":--" if column.is_text else "--:" for column in columns]))
    lines += [_line(list(map(escaped, row))) for row in cells]
    for footnote in footnotes:
        lines += ["", f"{escaped(footnote.heading)}", "", *(f"- {escaped(line)}" for line in footnote.lines)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    r"""A text that Markdown shows literally: no emphasis, link, HTML or end of a cell.

    >>> escaped("a*b|<b>")
    'a\\*b\\|\\<b\\>'
    """
    # An underscore inside a word has no meaning, and stays readable.
    return re.sub(r"([\\`*\[\]<>|~&#!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
