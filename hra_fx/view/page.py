"""The page: one picture of the model, one of each module that is closed in another picture, and the report.

It is one file without references to others. A closed box links to its picture, and the line above a picture leads back.
The script shows one picture at a time; without it, they are below each other.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, tostring

from hra_fx.reporting.columns import grouped_table_of, table_of
from hra_fx.reporting.table import Column
from hra_fx.reporting.words import counted
from hra_fx.view.drawing import Drawing
from hra_fx.view.heatmap import Heatmap, heatmap_of
from hra_fx.view.layout import Box, place
from hra_fx.view.opening import Opening, opening
from hra_fx.view.svg import draw, number
from hra_fx.view.svg_file import LINE, arrow, entries
from hra_fx.view.theme import COLORS, colored, dark_rules
from hra_fx.view.tree import Leaf, Scope

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_REPORT, _SKIPPED = "//report", "//not-adapted"  # addresses of sections


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its module, its address, and the name and address of the pictures that lead to it."""

    scope: Scope
    is_open: Opening
    address: str
    way: tuple[tuple[str, str], ...]


class _Pictures:
    """Draws the picture of a model, and those of the modules that are closed in it and in each other."""

    def __init__(self, root: Scope, is_open: Opening, heatmap: Heatmap) -> None:
        self.heatmap = heatmap
        self.looks: set[str] = set()
        self._taken = {"//arrow", _REPORT, _SKIPPED}  # the ids on the page
        self._waiting = [Picture(root, is_open, self._address("/"), ())]
        self._current = self._waiting[0]

    def drawn(self) -> Iterator[str]:
        """Each picture as a `<figure>`."""
        for picture in self._waiting:  # grows
            self._current = picture
            is_model = not picture.scope.path
            box = place(picture.scope, picture.is_open, self.heatmap, root=is_model)
            self.looks |= box.looks()
            root = _svg(box.size.width + 4, box.size.height + 4)
            draw(root, box, 2, 2, self._link, root=is_model)
            way = "".join(f'<a href="#{quote(address)}">{html.escape(name)}</a> / ' for name, address in picture.way)
            line = f"<figcaption>{way}<b>{html.escape(_name(picture.scope))}</b></figcaption>"
            yield f'<figure id="{html.escape(picture.address)}">{line if way else ""}{_text(root)}</figure>'

    def _link(self, group: Element, box: Box) -> None:
        """Give a box the addresses of its layers, and link it to itself, or to the picture of a closed module."""
        item, here = box.item, self._current
        if item is here.scope:
            return
        paths = dict.fromkeys(item.paths)  # the modules that the box stands for, and the layers in a leaf
        if isinstance(item, Leaf):
            paths |= dict.fromkeys((*item.marks, *(layer.path for layer in item.skipped), *item.trained))
        for path in paths:
            if path and path not in self._taken:
                self._taken.add(path)
                if group.get("id") is None:
                    group.set("id", path)
                else:
                    SubElement(group, "g", {"class": "name", "id": path})
        address = group.get("id", "")
        if isinstance(item, Scope) and box.look == "closed":
            address = self._address(f"/{item.path}")
            way = (*here.way, (_name(here.scope), here.address))
            self._waiting.append(Picture(item, opening(item), address, way))
        if address and box.parts is None:
            group.tag = "a"
            group.set("href", f"#{quote(address)}")

    def _address(self, wanted: str) -> str:
        """An id that no other element has: a shared module has one picture for each call."""
        address, call = wanted, 1
        while address in self._taken:
            call += 1
            address = f"{wanted}@{call}"
        self._taken.add(address)
        return address


def render_page(drawing: Drawing, root: Scope, is_open: Opening) -> str:
    """Render the page of a model, or of a part of it: one HTML file that needs no others."""
    pictures = _Pictures(root, is_open, heatmap_of(drawing.report.rows))
    figures = "\n".join(pictures.drawn())
    legend = ""
    for wide, entry in entries(pictures.looks, pictures.heatmap, root.skipped):
        sample = _svg(wide + 1, LINE)
        entry.set("transform", "translate(0 3.5)")
        sample.append(entry)
        legend += f"<li>{_text(sample)}</li>"
    found = drawing.report
    alarm = ' class="alarm"' * any(layer.targeted for layer in found.skipped)
    skipped = f'<a href="#{_SKIPPED}"{alarm}>{counted(len(found.skipped), "layer")} not adapted</a>'
    links = f'<a href="#{_REPORT}">Report</a>' * bool(found.rows) + skipped * bool(found.skipped)
    colors = "".join(f"  --{role}: light-dark({light}, {dark});\n" for role, (light, dark) in COLORS.items())
    marker = Element("svg")
    arrow(marker)
    words = {
        "title": html.escape(drawing.title_of(root)),
        "facts": html.escape(drawing.facts),
        "style": f"\n:root {{\n{colors}}}\n{dark_rules(figures + legend)}\n{_file('page.css')}",
        "links": links,
        "pictures": figures,
        "sections": "\n".join(_sections(drawing)),
        "legend": legend,
        "arrow": _text(marker),
        "script": "\n" + _file("page.js"),
    }
    return _SLOT.sub(lambda slot: words[slot[1]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _name(scope: Scope) -> str:
    """The name of a picture: the path of its module, and how many modules it stands for."""
    return (scope.path or scope.name) + f" × {scope.count}" * (scope.count > 1)


def _svg(wide: float, high: float) -> Element:
    size = {"viewBox": f"0 0 {number(wide)} {number(high)}", "width": number(wide), "height": number(high)}
    return Element("svg", {**size, "style": f"--wide:{number(wide)}"})


def _text(root: Element) -> str:
    colored(root)
    return tostring(root, encoding="unicode")


def _sections(drawing: Drawing) -> Iterator[str]:
    """The report, with repeated layers on one line and with all rows; and each layer without an adapter."""
    found = drawing.report
    notes = [
        f"<h2>{html.escape(title)}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        for title, lines in found.footnotes().items()
    ]
    if found.rows:
        columns, rows = table_of(found.rows)
        every = _table(columns, rows, [row.path for row in found.rows])
        every = f"<details><summary>All {counted(len(rows), 'row')}</summary>{every}</details>"
        table = _table(*grouped_table_of(found.rows))
        yield f'<section id="{_REPORT}"><h2>Report</h2>{table}{every}{"".join(notes)}</section>'
    if found.skipped:
        lines = [[layer.path, layer.layer_type, layer.reason] for layer in found.skipped]
        names = [Column(name, is_text=True) for name in ("layer", "type", "why it has no adapter")]
        yield f'<section id="{_SKIPPED}"><h2>Layers without an adapter</h2>{_table(names, lines)}</section>'


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], paths: Sequence[str] = ()) -> str:
    looks = [' class="text"' * column.is_text for column in columns]
    head = "".join(f"<th{look}>{html.escape(column.name)}</th>" for look, column in zip(looks, columns, strict=True))
    lines = []
    for index, row in enumerate(rows):
        path = f' data-path="{html.escape(paths[index])}"' if paths else ""
        cells = (f"<td{look}>{html.escape(text)}</td>" for look, text in zip(looks, row, strict=True))
        lines.append(f"<tr{path}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
