"""The picture: training and inference of every method beside the base model, by tokens, at rank 8 in float32.

On white, which is read on light and dark pages alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.reporting.plots.canvas import GRID, QUIET, entitle, new_figure, style, write
from speed.grid import LLAMA
from speed.methods import METHODS
from speed.results import Results
from speed.setting import Mode, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, which every eye tells apart; the marks differ too.
LOOKS = {
    "peft-hra": ("#CC79A7", "s"),
    "oft": ("#E69F00", "^"),
    "lora": ("#0072B2", "D"),
    "ours-gs": ("#56B4E9", "v"),
    "ours": ("#D55E00", "o"),
    "folded": ("#009E73", "x"),
}
PANELS: tuple[tuple[Mode, str], ...] = (("training", "training step"), ("inference", "inference"))
WIDE, HIGH, GAP = 3.6, 3.0, 0.5
TICKS = (0.8, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)

Points = dict[str, dict[int, float]]


def points(results: Results, mode: Mode) -> Points:
    """By method and tokens: how many times the base's."""
    found: Points = {}
    for cell in results.cells:
        setting = cell.setting
        if setting == Setting(LLAMA, mode, setting.size):
            for key in LOOKS:
                if value := cell.ratio(key, "base"):
                    found.setdefault(key, {})[setting.size] = value.median
    return found


def plotted(results: Results) -> bool:
    """Whether there is a curve to draw: two sizes or more."""
    return any(len(curve) > 1 for curve in points(results, "training").values())


def draw(results: Results, file: Path) -> Path:
    """Write the picture."""
    with style():
        figure = new_figure(2 * WIDE + GAP, HIGH)
        panels = [points(results, mode) for mode, _ in PANELS]
        sizes = sorted({size for panel in panels for curve in panel.values() for size in curve})
        values = [value for panel in panels for curve in panel.values() for value in curve.values()]
        for place, (panel, (_, title)) in enumerate(zip(panels, PANELS, strict=True)):
            left = place * (WIDE + GAP) / (2 * WIDE + GAP)
            axes = figure.add_axes((left, 0, WIDE / (2 * WIDE + GAP), 1))
            _panel(axes, panel, sizes)
            # The same for both, or a panel without slow methods would blow up its noise.
            axes.set_ylim(min(0.8, 0.9 * min(values)), 1.3 * max(values))
            axes.set_title(title, loc="left", fontsize=9, color=QUIET)
        first = figure.axes[0]
        subtitle = "Llama, d=768, 3 layers, float32, r=8; times the frozen base's time, lower is better"
        entitle(first, "HRA, LoRA and OFT beside the base model", subtitle, points=26)
        _legend(figure.axes[-1], panels)
        return write(figure, file)


def _panel(axes: Axes, panel: Points, sizes: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.axhline(1, color=QUIET, linewidth=1)
    for key, (color, mark) in LOOKS.items():
        curve = panel.get(key, {})
        places = [place for place, size in enumerate(sizes) if size in curve]
        values = [curve[sizes[place]] for place in places]
        axes.plot(places, values, color=color, marker=mark, markersize=5, linewidth=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    axes.set_xlabel("tokens")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(axes: Axes, panels: list[Points]) -> None:
    from matplotlib.lines import Line2D

    shown = {key: look for key, look in LOOKS.items() if any(key in panel for panel in panels)}
    handles = [Line2D([], [], color=color, marker=mark, markersize=5) for color, mark in shown.values()]
    labels = [METHODS[key].title for key in shown]
    axes.legend(handles, labels, frameon=False, loc="upper left", bbox_to_anchor=(1.03, 1), borderaxespad=0)
