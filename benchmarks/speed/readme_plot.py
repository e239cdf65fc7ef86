"""The picture of speed in README.md, light and dark, from the tables in docs/benchmarks.md.

PYTHONPATH=benchmarks python -m speed.readme_plot
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hra_fx.reporting.plots import new_figure, style, write
from hra_fx.view.theme import COLORS, THEMES, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
TABLE = "### Training step: Llama, d=768, 3 layers, r=8"
SIZES = (16, 512, 2048)
#: Heading of a column -> color on light and on dark, line width, and where its labels are, in points above a point. The
#: last one is in front.
LOOKS = {
    "PEFT HRA": (("#8a6a7d", "#b893a8"), 2.0, 8),
    "PEFT LoRA": (("#4b86c4", "#6fa8e0"), 2.0, 8),
    "hra_fx": (("#c2410c", "#fb8c4b"), 4.5, -17),
}

Ratios = dict[str, dict[int, float]]


def ratios(page: str) -> Ratios:
    """By method and tokens: the time of a training step in float32, divided by that of the frozen base model.

    Args:
        page: the text of docs/benchmarks.md.

    Raises:
        ValueError: the page has no such table, or a size is missing.
    """
    if TABLE not in page:
        raise ValueError(f"the page has no table {TABLE!r}")
    lines = [line for line in page.partition(TABLE)[2].partition("\n#")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found: Ratios = {method: {} for method in LOOKS}
    for row in (dict(zip(head, cells, strict=True)) for cells in rows):
        tokens = int(row["size"].split()[0])
        if row["dtype"] == "float32" and tokens in SIZES:
            for method in LOOKS:
                found[method][tokens] = float(row[method])
    if any(set(curve) != set(SIZES) for curve in found.values()):
        raise ValueError(f"the table {TABLE!r} does not have all sizes {SIZES}")
    return found


def draw(found: Ratios, file: Path, theme: Theme) -> Path:
    """Write the picture."""
    place = THEMES.index(theme)
    ink, quiet, paper, rule = (COLORS[role][place] for role in ("ink", "faint", "card", "rule"))
    with style():
        figure = new_figure(7.4, 3.3)
        figure.set_facecolor(paper)
        axes = figure.add_axes((0, 0, 1, 1), facecolor=paper)
        axes.axhline(1, color=quiet, linewidth=1, linestyle=(0, (4, 3)))
        for method, (colors, wide, above) in LOOKS.items():
            _curve(axes, method, found[method], colors[place], wide, above, paper)
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20], ["frozen base", "2×", "5×", "10×", "20×"], color=ink, fontsize=10)
        axes.minorticks_off()
        axes.set_ylim(0.72, 26)
        axes.set_xlim(-0.3, len(SIZES) - 0.55)
        axes.set_xticks(range(len(SIZES)), [f"{size} tokens" for size in SIZES], color=ink, fontsize=10)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=rule, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        measured = "Llama, d=768, 3 layers, r=8, on a CPU"
        subtitle = f"Divided by that of the frozen base model; log axis, lower is better. {measured}."
        axes.text(0, 1.05, subtitle, transform=axes.transAxes, color=quiet, fontsize=10)
        axes.text(
            0, 1.13, "Time of a training step", transform=axes.transAxes, color=ink, fontsize=12, fontweight="bold"
        )
        return write(figure, file)


def _curve(axes: Axes, method: str, curve: dict[int, float], color: str, wide: float, above: int, paper: str) -> None:
    values = [curve[size] for size in SIZES]
    axes.plot(range(len(SIZES)), values, color=color, linewidth=wide, marker="o", markersize=5 + wide)
    for place, value in enumerate(values):
        text = f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"
        shift: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": color, "fontsize": 10}
        shift["bbox"] = {"facecolor": paper, "linewidth": 0, "pad": 0.5}  # the line of the base model is behind it
        axes.annotate(text, (place, value), (0, above), fontweight="bold" if wide > 3 else "normal", **shift)
    weight = "bold" if wide > 3 else "normal"
    side = -3 if wide > 3 else 3
    last = (len(SIZES) - 1, values[-1])
    axes.annotate(
        method, last, (16, side), textcoords="offset points", va="center", color=color, fontsize=11, fontweight=weight
    )


def main(docs: Path = ROOT / "docs") -> None:
    """Write `speed-light.svg` and `speed-dark.svg`."""
    found = ratios((docs / "benchmarks.md").read_text(encoding="utf-8"))
    for theme in THEMES:
        print(draw(found, docs / f"speed-{theme}.svg", theme))


if __name__ == "__main__":
    main()
