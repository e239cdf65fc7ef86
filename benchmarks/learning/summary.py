"""Statistics of the records: paired differences between methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from learning.rates import final_runs, sign
from learning.records import Record

#: The 97.5% quantile of Student's t distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, half of its 95% interval, and its standard error."""

    mean: float
    half: float
    error: float


def difference(values: dict[int, float], base: dict[int, float]) -> Difference:
    """The paired difference over the seeds that both have; NaN intervals for a single seed."""
    pairs = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if len(pairs) < 2:
        return Difference(pairs[0] if pairs else math.nan, math.nan, math.nan)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), STUDENT[len(pairs) - 1] * error, error)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean of at least three values; 0 of fewer."""
    if len(values) < 3:
        return 0.0
    return STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def gain(records: Sequence[Record], task: str, method: str, base: str, name: str = "") -> Difference:
    """How much better a method is than another: on the test split, or in what it retains as `name`.

    Positive is better, for every metric.
    """
    up = sign(task) if not name else -1 if name.startswith("perplexity") else 1
    method_values, base_values = (
        {run.seed: up * value(run, name) for run in final_runs(records, task, one)} for one in (method, base)
    )
    return difference(method_values, base_values)


def value(run: Record, name: str = "") -> float:
    """The test score, or what is retained as `name`."""
    assert run.test is not None
    return run.retention[name] if name else run.test


def scores(records: Sequence[Record], name: str = "") -> list[float]:
    """Test scores, or what is retained as `name`, in the runs that measured it."""
    return [value(run, name) for run in records if not name or name in run.retention]
