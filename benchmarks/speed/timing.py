"""Measures steps in turns, in one process.

Each round runs every step once, in a new random order. Each counted step comes after an uncounted step of the same
model, because another model has pushed its weights out of the processor's caches.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """What is measured.

    Attributes:
        run: the measured part.
        warm_ups: how many uncounted runs follow the first one.
    """

    run: Callable[[], object]
    warm_ups: int = 1


@dataclass(frozen=True)
class Budget:
    """How long a measurement may take, and how many rounds it has.

    Attributes:
        seconds: for the rounds, without the warm-up.
        least: the least number of rounds, however long they take.
        most: the largest number of rounds, however short they are.
        least_slow: the least number for a method that takes many times as long as the others.
    """

    seconds: float
    least: int = 5
    most: int = 40
    least_slow: int = 3


@dataclass
class Measured:
    """The results of a measurement.

    Attributes:
        values: by method, one for each round; `None` for rounds without the method.
        left_out: by method, why it was not measured.
    """

    values: dict[str, list[float | None]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


#: Gives the seconds of one run of a step.
Measure = Callable[[Step], float]

#: Steps of at least this many seconds have no uncounted step before them: cold caches hardly matter.
LONG = 2.0
#: A method that takes more than this many times the median is slow, and runs in only some of the rounds.
SLOW = 2.5
#: The share of the budget for all slow methods.
FOR_SLOW = 0.25


def interleave(steps: Mapping[str, Step], budget: Budget, measure: Measure) -> Measured:
    """Measure steps in turns; one that fails is left out, with the reason.

    Args:
        steps: by method.
        budget: for all together.
        measure: gives the seconds of one run.
    """
    measured, usual = Measured(), dict[str, float]()
    for name, step in steps.items():
        try:
            usual[name] = warm_up(step, measure)
        except Exception as error:
            measured.left_out[name] = reason(error)
    taking_part = attendance(usual, budget)
    with garbage_of_now_kept():
        for names in rounds_of(taking_part):
            gc.collect()
            found = {name: counted(steps[name], usual[name], measure) for name in names}
            for name in taking_part:
                measured.values.setdefault(name, []).append(found.get(name))
    return measured


def rounds_of(taking_part: Mapping[str, Sequence[bool]]) -> Iterator[list[str]]:
    """The methods of each round, in a new random order."""
    order = random.Random(0)
    for turn in range(max((len(turns) for turns in taking_part.values()), default=0)):
        names = [name for name, turns in taking_part.items() if turns[turn]]
        order.shuffle(names)
        yield names


@contextmanager
def garbage_of_now_kept() -> Iterator[None]:
    """Exclude existing objects from garbage collection: to scan those of all libraries takes longer than a step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def reason(error: Exception) -> str:
    """The first line of an error, with its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def clocked(step: Step, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run, without garbage collection, which would also collect the garbage of other methods."""
    gc.disable()
    try:
        begin = now()
        step.run()
        return now() - begin
    finally:
        gc.enable()


def by_processor(step: Step) -> float:
    """Seconds of CPU time: other programs matter less, but waiting threads count too."""
    return clocked(step, now=time.process_time)


def warm_up(step: Step, measure: Measure) -> float:
    """Seconds of the last warm-up run."""
    usual = measure(step)
    if step.warm_ups > 1 or usual < LONG:
        for _ in range(step.warm_ups):
            usual = measure(step)
    return usual


def counted(step: Step, usual: float, measure: Measure) -> float:
    """Seconds of one run after an uncounted one."""
    if usual < LONG:
        measure(step)
    return measure(step)


def attendance(usual: Mapping[str, float], budget: Budget) -> dict[str, list[bool]]:
    """Which methods run in which rounds.

    Methods that are much slower than the median share a quarter of the budget, and their rounds are evenly spaced. All
    others run in every round.
    """
    if not usual:
        return {}
    limit = SLOW * statistics.median_low(usual.values())
    cost = {name: seconds * (1 if seconds >= LONG else 2) for name, seconds in usual.items()}
    slow = {name for name, seconds in usual.items() if seconds > limit}
    for_slow = FOR_SLOW * budget.seconds if slow else 0.0
    fast = sum(cost[name] for name in usual if name not in slow)
    rounds = between(budget.least, int((budget.seconds - for_slow) / fast), budget.most)
    few = between(budget.least_slow, int(for_slow / max(1e-9, sum(cost[name] for name in slow))), rounds)
    chosen = evenly(min(few, rounds), rounds)
    return {name: [name not in slow or turn in chosen for turn in range(rounds)] for name in usual}


def between(least: int, wanted: int, most: int) -> int:
    return min(max(least, wanted), most)


def evenly(count: int, rounds: int) -> set[int]:
    """`count` evenly spaced rounds, from the first to the last.

    >>> sorted(evenly(3, 9)), evenly(1, 9)
    ([0, 4, 8], {0})
    """
    if count == 1:
        return {0}
    return {turn * (rounds - 1) // (count - 1) for turn in range(count)}
