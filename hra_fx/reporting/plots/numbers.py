"""Numbers that fit into a cell."""

from __future__ import annotations


def number(value: float) -> str:
    """A number of a plot in at most three letters or so.

    >>> [number(value) for value in (0.0, 0.004, 0.25, 7.31, 123.4)]
    ['0', '.004', '.25', '7.3', '123']
    """
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    if value < 0.0005:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.2g}".removeprefix("0")
