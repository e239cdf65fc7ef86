"""The labels of a heatmap's columns: the index of each block, and below it the module list that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hra_fx.reporting.plots.canvas import GRID, QUIET, inches, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def label_blocks(axes: Axes, blocks: Sequence[tuple[str, str]], cell: float) -> float:
    """Label the columns of a heatmap.

    Args:
        axes: axes in which each column is one unit wide.
        blocks: (stack, index) of each.
        cell: width of a column in inches.

    Returns:
        The height of the labels in points.
    """
    stacks: dict[str, list[int]] = {}
    for column, (stack, _) in enumerate(blocks):
        stacks.setdefault(stack, []).append(column)
    named = {stack: columns for stack, columns in stacks.items() if stack}
    if len(stacks) > 1 and any(inches(stack, 8) > cell * len(columns) for stack, columns in named.items()):
        return _upright(axes, blocks)
    step = next((step for step in _STEPS if step * cell >= 0.24), len(blocks))
    marked = [column for columns in stacks.values() for column in columns[::step]]
    axes.set_xticks([column + 0.5 for column in marked], [blocks[column][1] for column in marked], fontsize=8)
    for stack, columns in named.items():
        _bracket(axes, shown(stack), columns[0], columns[-1] + 1)
    return 34 if named else 16


def _upright(axes: Axes, blocks: Sequence[tuple[str, str]]) -> float:
    """Full names, rotated, if they are too long for their columns."""
    names = [shown(".".join(filter(None, block)), 56) for block in blocks]
    axes.set_xticks([column + 0.5 for column in range(len(names))], names, rotation=90, fontsize=7.5)
    return 72 * max(inches(name, 7.5) for name in names) + 6


def _bracket(axes: Axes, name: str, start: int, end: int) -> None:
    """A line below the columns of a stack, with its name."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    across = axes.get_xaxis_transform()
    middle = ((start + end) / 2, 0.0)
    axes.annotate(
        name,
        middle,
        (0, -20),
        xycoords=across,
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color=QUIET,
    )
    figure = axes.get_figure(root=True)
    assert figure is not None
    down = across + ScaledTranslation(0, -17 / 72, figure.dpi_scale_trans)
    axes.add_artist(Line2D([start + 0.08, end - 0.08], [0, 0], transform=down, color=GRID, clip_on=False))
