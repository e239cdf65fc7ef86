"""The picture: training and inference of every method relative to the base model, by tokens, at rank 8 in float32.

PEFT HRA has axes of its own above the others: it takes many times as long, so a common axis would hide what the others
differ by. White background, for light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hra_fx.reporting.plots import GRID, INK, QUIET, add_title, new_figure, style, write
from speed.grid import LLAMA
from speed.methods import METHODS
from speed.results import Results
from speed.setting import Mode, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLOW = "peft-hra"
# Okabe and Ito's colors, which people with color vision deficiency can tell apart; the markers differ too. The last
# one is in front.
LOOKS = {
    SLOW: ("#CC79A7", "s"),
    "oft": ("#E69F00", "^"),
    "folded": ("#009E73", "x"),
    "ours-gs": ("#56B4E9", "v"),
    "lora": ("#0072B2", "D"),
    "ours": ("#D55E00", "o"),
}
PANELS: tuple[tuple[Mode, str], ...] = (("training", "Training step"), ("inference", "Inference"))
# In inches: the size of a panel, of its part for the slow method, and the gaps.
WIDE, HIGH, TOP, GAP, BETWEEN = 3.55, 2.7, 0.75, 0.55, 0.25
WIDTH, HEIGHT = 2 * WIDE + GAP, HIGH + BETWEEN + TOP

Points = dict[str, dict[int, float]]


def points(results: Results, mode: Mode) -> Points:
    """By method and tokens: the ratio to the base model."""
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
        figure = new_figure(WIDTH, HEIGHT)
        panels = [points(results, mode) for mode, _ in PANELS]
        sizes = sorted({size for panel in panels for curve in panel.values() for size in curve})
        for place, (panel, (_, title)) in enumerate(zip(panels, PANELS, strict=True)):
            slow = _axes(figure, place, HIGH + BETWEEN, TOP)
            _slow(slow, panel.get(SLOW, {}), sizes)
            slow.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=6)
            fast = _axes(figure, place, 0, HIGH)
            if place:  # the same limits for both panels, so that they can be compared
                fast.sharey(figure.axes[1])
            _fast(fast, panel, sizes)
        subtitle = (
            "Llama, d=768, 3 layers, float32, r=8. Time divided by that of the frozen base model; lower is better."
        )
        add_title(figure.axes[0], "hra_fx compared with PEFT's LoRA, OFT and HRA", subtitle, points=32)
        _legend(figure, {key for panel in panels for key in panel})
        return write(figure, file)


def _axes(figure: Figure, place: int, bottom: float, height: float) -> Axes:
    """Axes in one of the two columns; lengths in inches."""
    axes = figure.add_axes((place * (WIDE + GAP) / WIDTH, bottom / HEIGHT, WIDE / WIDTH, height / HEIGHT))
    axes.tick_params(length=0, labelsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def _slow(axes: Axes, curve: dict[int, float], sizes: list[int]) -> None:
    """One curve on a log axis, each point with its value."""
    _curve(axes, SLOW, curve, sizes)
    for size, value in curve.items():
        text = f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"
        axes.annotate(text, (sizes.index(size), value), (0, 6), textcoords="offset points", ha="center", fontsize=10)
    axes.set_yscale("log")
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xticks([])
    axes.margins(y=0.45)
    axes.text(0.02, 0.06, f"{METHODS[SLOW].title}, log axis", transform=axes.transAxes, color=QUIET, fontsize=10)
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    axes.spines["bottom"].set_color(GRID)


def _fast(axes: Axes, panel: Points, sizes: list[int]) -> None:
    """All other curves on a linear axis."""
    from matplotlib.ticker import StrMethodFormatter

    axes.axhline(1, color=INK, linewidth=1)
    for key in LOOKS:
        if key != SLOW:
            _curve(axes, key, panel.get(key, {}), sizes)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.1f}×"))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    axes.set_xlabel("tokens", fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _curve(axes: Axes, key: str, curve: dict[int, float], sizes: list[int]) -> None:
    axes.plot([sizes.index(size) for size in curve], list(curve.values()), **_look(key))


def _look(key: str) -> dict[str, Any]:
    color, marker = LOOKS[key]
    front = key == "ours"
    return {"color": color, "marker": marker, "markersize": 7 if front else 5, "linewidth": 3 if front else 1.5}


def _legend(figure: Figure, shown: set[str]) -> None:
    from matplotlib.lines import Line2D

    keys = [key for key in reversed(LOOKS) if key in shown]
    handles = [Line2D([], [], **_look(key)) for key in keys]
    labels = [METHODS[key].title for key in keys]
    figure.legend(
        handles, labels, frameon=False, fontsize=10, ncols=len(keys), loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )
