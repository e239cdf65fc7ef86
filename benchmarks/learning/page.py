"""The tables of docs/results.md and docs/keep.md that come from the records, and the picture of README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from learning.kept import equal_movement_table, guide_table, kept_table, layers_table, others_table
from learning.kept_picture import DARK, LIGHT, kept_picture
from learning.records import FILE, Record
from learning.table import language_table, tasks_table

PAGE = FILE.with_name("results.md")
#: Each table of a page is between two comments with its name.
TABLES = {
    PAGE: {
        "tasks": tasks_table,
        "language": language_table,
        "kept": kept_table,
        "equal movement": equal_movement_table,
        "layers": layers_table,
        "other texts": others_table,
    },
    PAGE.with_name("keep.md"): {"guide": guide_table},
}


def files(records: Sequence[Record]) -> dict[Path, str]:
    """What the pages and the pictures should be."""
    pages = {page: page.read_text(encoding="utf-8") for page in TABLES}
    for page, tables in TABLES.items():
        for name, made in tables.items():
            start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            before, rest = pages[page].split(start)
            pages[page] = before + start + made(records) + end + rest.split(end)[1]
    pictures = {PAGE.with_name(f"kept-{name}.svg"): colors for name, colors in (("light", LIGHT), ("dark", DARK))}
    return {**pages, **{file: kept_picture(records, colors) for file, colors in pictures.items()}}


def write(records: Sequence[Record]) -> None:
    """Write them."""
    for file, text in files(records).items():
        file.write_text(text, encoding="utf-8")
