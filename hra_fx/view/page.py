"""The page: one picture of the model, one of each module that is closed in another picture, and the report.

It is one file without references to others, and without a script. A closed box links to its picture, and the line above
a picture leads back.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from importlib import resources
from string import Template
from urllib.parse import quote
from xml.etree.ElementTree import tostring

from hra_fx.reporting.columns import grouped_table_of, table_of
from hra_fx.reporting.table import Column
from hra_fx.reporting.words import counted
from hra_fx.view.drawing import Drawing
from hra_fx.view.opening import Opening, opening
from hra_fx.view.svg_file import picture_of, title_of
from hra_fx.view.theme import dark_rules
from hra_fx.view.tree import Scope


def render_page(drawing: Drawing, root: Scope, is_open: Opening) -> str:
    """Render the page of a model, or of a part of it: one HTML file that needs no others."""
    figures = "\n".join(_figures(drawing, root, is_open))
    page = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    title = html.escape(title_of(drawing, root))
    return page.substitute(title=title, dark=dark_rules(figures), figures=figures, report=_report(drawing))


def _figures(drawing: Drawing, root: Scope, is_open: Opening) -> Iterator[str]:
    """Each picture, with a link to the one that leads to it. An address is `/` and the path of the module."""
    waiting = {"/": (root, is_open, "")}
    for address in (found := ["/"]):  # grows
        scope, is_open, back = waiting[address]

        def link(closed: Scope, address: str = address) -> str:
            path = f"/{closed.path}"
            while path in waiting:  # a module that is called several times has a picture of each call
                path += "'"
            waiting[path] = (closed, opening(closed), address)
            found.append(path)
            return quote(path)

        svg = tostring(picture_of(drawing, scope, is_open, link), encoding="unicode")
        caption = f'<figcaption><a href="#{quote(back)}">Back</a></figcaption>' * bool(back)
        yield f'<figure id="{html.escape(address)}">{caption}{svg}</figure>'


def _report(drawing: Drawing) -> str:
    """The report, with repeated layers on one line, and with all rows."""
    found = drawing.report
    if not found.rows:
        return ""
    rows = f"<details><summary>All {counted(len(found), 'row')}</summary>{_table(*table_of(found.rows))}</details>"
    notes = "".join(
        f"<h3>{html.escape(title)}</h3><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        for title, lines in found.footnotes().items()
    )
    return f'<section id="//report"><h2>Report</h2>{_table(*grouped_table_of(found.rows))}{rows}{notes}</section>'


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    looks = [' class="text"' * column.is_text for column in columns]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = (f"<{tag}{look}>{html.escape(text)}</{tag}>" for look, text in zip(looks, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', [column.name for column in columns])}{''.join(line('td', row) for row in rows)}</table>"
