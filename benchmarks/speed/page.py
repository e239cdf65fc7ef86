"""docs/benchmarks.md: how it was measured, on what, the lines that must hold, and every table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speed.how import ON_CPU, ON_GPU
from speed.lines import findings
from speed.report_lines import FLOOR, as_table, noises
from speed.results import Cell, Results
from speed.surroundings import doubts
from speed.table import tables

SECTIONS = ("Eager", "Compiled", "Memory", "Once, and generating")


def page(results: Results, plot: str = "", gpu_page: str = "") -> str:
    """The whole page.

    Args:
        results: of a run.
        plot: the name of the picture beside it.
        gpu_page: the name of the page of a GPU beside it, where there is one.
    """
    gpu = results.about.get("run") == "gpu"
    return "\n".join([*_head(results, gpu), *([] if gpu else _lines(results, gpu_page)), *_body(results, plot)])


def _head(results: Results, gpu: bool) -> Iterator[str]:
    run = str(results.about.get("run"))
    yield from (f"# Speed and memory{' on a GPU' * gpu}", "")
    yield from (f"Written by `make bench{'' if run == 'full' else '-' + run}`; not to be edited.", "")
    if run == "quick":
        yield from ("This is the short run, which measures the lines that must hold and nothing else.", "")
    yield from (word for doubt in doubts(results.about) for word in (f"**{doubt}**", ""))
    yield from ("| | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in results.about.items() if key != "run")
    yield from ("", ON_GPU if gpu else ON_CPU)


def _lines(results: Results, gpu_page: str) -> Iterator[str]:
    found = findings(results)
    met = sum(finding.met for finding in found)
    yield from (f"## Lines that must hold: {met} of {len(found)} are met", "", FLOOR, *as_table(found), "")
    yield from (word for noise in noises(found) for word in (noise, ""))
    yield from ("## On a GPU", "")
    if gpu_page:
        yield from (f"See [{gpu_page}]({gpu_page}).", "")
    else:
        yield from ("Not run: no CUDA device was at hand. `make bench-gpu` measures and writes a page of its own.", "")


def _body(results: Results, plot: str) -> Iterator[str]:
    if plot:
        yield from (f"![Training step and inference beside the base model]({plot})", "")
    for section in SECTIONS:
        cells = [cell for cell in results.cells if _section(cell) == section]
        if cells:
            yield from (f"## {section}", "", *tables(cells, warm_compiler=results.about.get("run") == "quick"))


def _section(cell: Cell) -> str:
    mode = cell.setting.mode
    if mode in ("training", "inference"):
        return "Compiled" if cell.setting.compiled else "Eager"
    return "Memory" if mode in ("memory", "launches") else "Once, and generating"


def write(results: Results, folder: Path, names: Sequence[str] = ("benchmarks", "benchmarks_gpu")) -> list[Path]:
    """The page of a run, and its plot where there is something to plot; gives the files."""
    from speed.plot import draw, plotted

    gpu = results.about.get("run") == "gpu"
    name, other = names[gpu], f"{names[1]}.md"
    written = [folder / f"{name}.md"]
    if plotted(results):
        written.append(draw(results, folder / f"{name}.svg"))
    gpu_page = other if (folder / other).exists() and not gpu else ""
    written[0].write_text(page(results, plot=f"{name}.svg" if len(written) > 1 else "", gpu_page=gpu_page))
    return written
