"""Tables and numbers of docs/results.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from learning.summary import Difference


def spread(values: Sequence[float]) -> str:
    """The mean and the standard deviation."""
    if not values:
        return "-"
    return number(statistics.mean(values)) + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with numbers in all columns but the first."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(value: Difference) -> str:
    """A difference and half of its 95% interval."""
    mean = number(value.mean, sign="+")
    return mean if math.isnan(value.half) else f"{mean} ± {number(value.half)}"


def number(value: float, sign: str = "") -> str:
    """One decimal, or two for values below 10, where errors of less than a percent have to show."""
    return f"{value:{sign}.{1 if abs(value) >= 10 else 2}f}"
