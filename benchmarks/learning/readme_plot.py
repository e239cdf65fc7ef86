"""The picture of README.md: what a model keeps, over the score on the new task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.reporting.plots import new_figure, style, write
from hra_fx.view.theme import COLORS, THEMES, Theme
from learning.plan import SEEDS
from learning.rates import final_runs
from learning.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASK = "language"
#: Name of what is kept -> title of its panel.
PANELS = {
    "perplexity of tales": "Tales, of which samples were protected",
    "perplexity of tweets": "Tweets, which nobody protected",
}
#: Method -> its label, where the label is next to its point (in points), and how it is aligned.
LABELS = {
    "lora": ("LoRA", (0, -14), "right"),
    "lora-protect": ("LoRA, protected", (2, 8), "left"),
    "hra-pairs": ("HRA", (-8, -12), "center"),
    "hra-pairs-protect": ("HRA, protected", (6, 8), "center"),
}
#: Method -> the one with protection, and their color on light and on dark.
ARROWS = {"lora": ("lora-protect", ("#4b86c4", "#6fa8e0")), "hra-pairs": ("hra-pairs-protect", ("#c2410c", "#fb8c4b"))}

Points = dict[str, tuple[float, float]]


def points(records: Sequence[Record], name: str) -> Points:
    """Method -> its mean test score, and what it keeps."""
    found = {}
    for method in LABELS:
        runs = [run for run in final_runs(records, TASK, method) if run.seed in SEEDS]
        score = statistics.fmean(run.test for run in runs if run.test is not None)
        found[method] = (score, statistics.fmean(run.retention[name] for run in runs))
    return found


def write_both(records: Sequence[Record], folder: Path) -> None:
    """Write `kept-light.svg` and `kept-dark.svg` into a folder."""
    for theme in THEMES:
        draw(records, folder / f"kept-{theme}.svg", theme)


def draw(records: Sequence[Record], file: Path, theme: Theme) -> Path:
    """Write the picture."""
    place = THEMES.index(theme)
    ink, quiet, paper = (COLORS[role][place] for role in ("ink", "faint", "card"))
    with style():
        figure = new_figure(8.4, 2.9)
        figure.set_facecolor(paper)
        for panel, (name, title) in enumerate(PANELS.items()):
            axes = figure.add_axes((0.54 * panel, 0, 0.46, 0.8), facecolor=paper)
            (before,) = {run.retention[name] for run in final_runs(records, TASK, "base")}
            _panel(axes, points(records, name), before, place)
            axes.text(0, 1.06, title, transform=axes.transAxes, color=ink, fontsize=11, fontweight="bold")
            axes.set_xlabel("perplexity of the new posts (right is better)", color=quiet)
            axes.set_ylabel("perplexity (up is better)", color=quiet)
        return write(figure, file)


def _panel(axes: Axes, found: Points, before: float, place: int) -> None:
    ink, quiet, rule = (COLORS[role][place] for role in ("ink", "faint", "rule"))
    axes.axhline(before, color=quiet, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "before training", (1, before), (0, 4), ("axes fraction", "data"), "offset points", color=quiet, ha="right"
    )
    for method, (protected, colors) in ARROWS.items():
        color = colors[place]
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6, "shrinkA": 5, "shrinkB": 6}
        axes.annotate("", found[protected], found[method], arrowprops=arrow)
        axes.plot(*found[method], marker="o", markersize=6, color=color, fillstyle="none", markeredgewidth=1.8)
        axes.plot(*found[protected], marker="o", markersize=9, color=color)
        for one in (method, protected):
            label, shift, side = LABELS[one]
            weight = "bold" if one == "hra-pairs-protect" else "normal"
            axes.annotate(label, found[one], shift, textcoords="offset points", ha=side, color=color, fontweight=weight)
    axes.margins(0.16, 0.2)
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.tick_params(length=0, labelcolor=ink)
    axes.grid(color=rule, linewidth=0.8)
    axes.spines[:].set_visible(False)
