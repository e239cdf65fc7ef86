"""docs/benchmarks.md: the machine, the method, all tables, and the performance targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speed.environment import caveats
from speed.notes import ON_CPU, ON_GPU
from speed.results import Cell, Results
from speed.table import tables
from speed.target_report import FLOOR, as_table, noises
from speed.targets import findings

SETUP = "Setup and generation"
SECTIONS = ("Eager", "Compiled", "Memory", SETUP)


def page(results: Results, plot: str = "", gpu_page: str = "") -> str:
    """The whole page.

    Args:
        results: the results of a run.
        plot: file name of the plot.
        gpu_page: file name of the page for a GPU, if there is one.
    """
    gpu = results.about.get("run") == "gpu"
    return "\n".join([*_head(results, gpu), *_body(results, plot), *([] if gpu else _targets(results, gpu_page))])


def _head(results: Results, gpu: bool) -> Iterator[str]:
    run = str(results.about.get("run"))
    yield from (f"# Speed and memory{' on a GPU' * gpu}", "")
    yield from (f"Written by `make bench{'' if run == 'full' else '-' + run}`; do not edit.", "")
    if run == "quick":
        yield from ("This is the short run, which measures only the performance targets.", "")
    yield from (word for doubt in caveats(results.about) for word in (f"**{doubt}**", ""))
    yield from ("| | |", "|---|---|")
    yield from (f"| {key} | {value} |" for key, value in results.about.items() if key != "run")
    yield from ("", ON_GPU if gpu else ON_CPU)


def _targets(results: Results, gpu_page: str) -> Iterator[str]:
    found = findings(results)
    met = sum(finding.met for finding in found)
    yield from (f"## Performance targets: {met} of {len(found)} met", "", FLOOR, *as_table(found), "")
    yield from (word for noise in noises(found) for word in (noise, ""))
    yield from ("## On a GPU", "")
    if gpu_page:
        yield from (f"See [{gpu_page}]({gpu_page}).", "")
    else:
        yield from ("Not measured: there was no CUDA device. `make bench-gpu` writes a separate page.", "")


def _body(results: Results, plot: str) -> Iterator[str]:
    if plot:
        yield from (f"![Training step and inference relative to the base model]({plot})", "")
    for section in SECTIONS:
        cells = [cell for cell in results.cells if _section(cell) == section]
        if cells:
            yield from (f"## {section}", "", *tables(cells, warm_compiler=results.about.get("run") == "quick"))


def _section(cell: Cell) -> str:
    mode = cell.setting.mode
    if mode in ("training", "inference"):
        return "Compiled" if cell.setting.compiled else "Eager"
    return "Memory" if mode in ("memory", "launches") else SETUP


def write(results: Results, folder: Path, names: Sequence[str] = ("benchmarks", "benchmarks_gpu")) -> list[Path]:
    """Write the page of a run, and its plot if there is something to plot; return the files."""
    from speed.plot import draw, plotted

    gpu = results.about.get("run") == "gpu"
    name, other = names[gpu], f"{names[1]}.md"
    written = [folder / f"{name}.md"]
    if plotted(results):
        written.append(draw(results, folder / f"{name}.svg"))
    gpu_page = other if (folder / other).exists() and not gpu else ""
    written[0].write_text(page(results, plot=f"{name}.svg" if len(written) > 1 else "", gpu_page=gpu_page))
    return written
