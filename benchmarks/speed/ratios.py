"""The statistic of every comparison: the median over rounds of the ratio of two methods in the same round.

If something slows the machine for a while, it slows both, so ratios vary less than times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: One value for each round; `None` for rounds without the method.
Values = Sequence[float | None]


@dataclass(frozen=True)
class Ratio:
    """A median of ratios, and the interval it lies in.

    Attributes:
        median: of the pairs.
        low: the lower end of the interval: 95% for the median where there are six pairs or more, else all of them.
        high: its upper end.
        rounds: how many pairs.
    """

    median: float
    low: float
    high: float
    rounds: int


def ratio(own: Values, peer: Values) -> Ratio | None:
    """Of the rounds in which both took part; `None` where there are none.

    >>> ratio([2.0, 9.0, 4.0, None], [1.0, 3.0, 4.0, 5.0])
    Ratio(median=2.0, low=1.0, high=3.0, rounds=3)
    """
    pairs = sorted(a / b for a, b in zip(own, peer, strict=True) if a is not None and b is not None)
    if not pairs:
        return None
    outside = ranks_outside(len(pairs))
    return Ratio(statistics.median(pairs), pairs[outside], pairs[-1 - outside], len(pairs))


def ranks_outside(count: int) -> int:
    """How many of the sorted values lie below a 95% interval of the median, and as many above.

    A value is below the median with a probability of one half, so the number below it is binomial (the sign test).
    """
    outside, tail = 0, 0.5**count
    while tail <= 0.025:
        outside += 1
        tail += math.comb(count, outside) * 0.5**count
    return max(0, outside - 1)


def median(values: Values) -> float | None:
    """Of the rounds that a method took part in."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
