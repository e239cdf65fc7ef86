"""Times of several calls that take turns, so that other programs on the machine slow all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, one of each in every round, after an uncounted one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = now()
            call()
            if turn:
                times[name].append(now() - begin)
    return times


def ratio(own: list[float], other: list[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(one / theirs for one, theirs in zip(own, other, strict=True))
