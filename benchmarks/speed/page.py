"""docs/benchmarks.md: the results, then the method, and last the performance targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from speed.environment import caveats
from speed.notes import METHOD, SUMMARY, TABLES, TARGETS
from speed.results import Cell, Results
from speed.summary import summary
from speed.table import tables
from speed.target_report import as_table, count_met
from speed.targets import findings

SETUP = "Setup and generation"
SECTIONS = ("Training and inference", "Compiled", "Memory", SETUP)
#: The space between a number and its unit, where a narrow column of a table would break the line.
SPACE = re.compile(r"(?<=\d) (?=(ms|s|MB|tokens?|images?)\b)")


def page(results: Results, plot: str = "") -> str:
    """The whole page.

    Args:
        results: the results of a run.
        plot: file name of the plot.
    """
    lines = [*_head(results), *_results(results, plot), *_method(results), *_targets(results)]
    return "\n".join(SPACE.sub("\N{NO-BREAK SPACE}", line) if line.startswith("|") else line for line in lines)


def _head(results: Results) -> Iterator[str]:
    quick = results.about.get("run") == "quick"
    yield from (f"<!-- Written by make bench{'-quick' * quick}; do not edit. -->", "# Speed and memory", "")
    if quick:
        yield from ("This is the short run, which measures only the performance targets.", "")
    yield from (word for doubt in caveats(results.about) for word in (f"**{doubt}**", ""))


def _results(results: Results, plot: str) -> Iterator[str]:
    rows = list(summary(results))
    if rows:
        yield from (SUMMARY, *rows, "")
    if plot:
        yield from (f"![Time of a training step and of inference relative to the frozen base model]({plot})", "")
    if results.cells:
        yield TABLES
    for section in SECTIONS:
        cells = [cell for cell in results.cells if _section(cell) == section]
        if cells:
            yield from (f"## {section}", "", *tables(cells, warm_compiler=results.about.get("run") == "quick"))


def _section(cell: Cell) -> str:
    mode = cell.setting.mode
    if mode in ("training", "inference"):
        return SECTIONS[cell.setting.compiled]
    return "Memory" if mode == "memory" else SETUP


def _method(results: Results) -> Iterator[str]:
    yield from ("## How it was measured", "", METHOD, "| environment | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in results.about.items() if key != "run")
    yield ""


def _targets(results: Results) -> Iterator[str]:
    found = findings(results)
    yield from (f"## Performance targets: {count_met(found)} met", "", TARGETS, *as_table(found), "")


def write(results: Results, folder: Path) -> list[Path]:
    """Write the page of a run, and its plot if there is something to plot; return the files."""
    from speed.plot import draw, plotted

    file = folder / "benchmarks.md"
    plots = [draw(results, file.with_suffix(".svg"))] if plotted(results) else []
    file.write_text(page(results, plot=plots[0].name if plots else ""))
    return [file, *plots]
