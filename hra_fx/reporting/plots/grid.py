"""Layers as a grid: a row for each projection, a column for each block, by their paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """The place of a layer in the grid.

    Attributes:
        stack: path of the module list that the block is in; `""` at the root, or if there is none.
        block: its index there; `""` if there is none.
        projection: name of the layer inside the block.
    """

    stack: str
    block: str
    projection: str


@dataclass(frozen=True)
class Grid:
    """Paths as rows and columns.

    Attributes:
        projections: names of the rows, in model order, as short as is unique.
        blocks: (stack, index) of the columns, in model order.
        places: path -> (row, column).
    """

    projections: tuple[str, ...]
    blocks: tuple[tuple[str, str], ...]
    places: dict[str, tuple[int, int]]


def grid_of(paths: Iterable[str]) -> Grid:
    """The grid of some layers.

    Example:
        >>> grid = grid_of([f"model.layers.{i}.attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")])
        >>> grid.projections, grid.blocks
        (('q_proj', 'v_proj'), (('model.layers', '0'), ('model.layers', '1')))
        >>> grid.places["model.layers.1.attn.q_proj"]
        (0, 1)
    """
    cells = {path: cell_of(path) for path in paths}
    blocks = list(dict.fromkeys((cell.stack, cell.block) for cell in cells.values()))
    # Keep the blocks of a stack together.
    stacks = list(dict.fromkeys(stack for stack, _ in blocks))
    blocks.sort(key=lambda block: stacks.index(block[0]))
    projections = list(dict.fromkeys(cell.projection for cell in cells.values()))
    places = {
        path: (projections.index(cell.projection), blocks.index((cell.stack, cell.block)))
        for path, cell in cells.items()
    }
    return Grid(tuple(_short(projections)), tuple(blocks), places)


def cell_of(path: str) -> Cell:
    """The cell of a path. The block is the last number that is followed by a name, else the last number.

    Example:
        >>> cell_of("layer1.0.downsample.0"), cell_of("features.3"), cell_of("lm_head")
        (Cell(stack='layer1', block='0', projection='downsample.0'), Cell(stack='features', block='3', \
projection='features'), Cell(stack='', block='', projection='lm_head'))
    """
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    inner = [place for place in numbers if not all(part.isdigit() for part in parts[place + 1 :])]
    before = [place for place in numbers if place + 1 < len(parts)]
    if not numbers:
        return Cell("", "", path)
    place = inner[-1] if inner else before[0] if before else numbers[-1]
    stack = ".".join(parts[:place])
    return Cell(stack, parts[place], ".".join(parts[place + 1 :]) or stack or "layer")


def _short(names: list[str]) -> list[str]:
    """Each name cut to its shortest unique dotted end that does not start with a number."""
    return [_shortest(name, [other for other in names if other != name]) for name in names]


def _shortest(name: str, others: list[str]) -> str:
    parts = name.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not parts[-length].isdigit() and not any(f".{other}".endswith(f".{end}") for other in others):
            return end
    return name
