"""Statistics of the records: means, paired differences, and how much of the way to full fine-tuning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from learning.plan import TRIAL_SEEDS
from learning.rates import chosen, final_runs
from learning.records import Record, matched_rank, of
from learning.tasks import TASKS

#: The 97.5% quantile of Student's t distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, half of its 95% interval, and its standard error."""

    mean: float
    half: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """HRA against LoRA on a task. Differences are positive where HRA is better, whatever the metric.

    Args:
        task: its name.
        lora, hra, full: means of the test scores; `full` is None where it was not run.
        gain: HRA's gain over LoRA, over the seeds that both have.
        distance: the gain of full fine-tuning over LoRA.
        closed: the share of this distance that HRA covers; None where the distance is within its 95% interval of zero.
        seeds: the number of HRA's runs.
    """

    task: str
    lora: float
    hra: float
    full: float | None
    gain: Difference
    distance: Difference | None
    closed: float | None
    seeds: int

    @property
    def holds(self) -> bool:
        """Whether HRA's mean is at least LoRA's minus one standard error of the paired difference."""
        return self.gain.mean >= -self.gain.error


def scores(records: Sequence[Record]) -> list[float]:
    """Test scores."""
    return [record.test for record in records if record.test is not None]


def difference(values: dict[int, float], base: dict[int, float]) -> Difference:
    """The paired difference over the seeds that both have; NaN intervals for a single seed."""
    pairs = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if len(pairs) < 2:
        return Difference(pairs[0] if pairs else math.nan, math.nan, math.nan)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), STUDENT[len(pairs) - 1] * error, error)


def gain(records: Sequence[Record], task: str, method: str, base: str) -> Difference:
    """The gain of a method over another on the test split; positive is better."""
    sign = 1 if TASKS[task].higher_is_better else -1
    signed = [
        {record.seed: sign * record.test for record in final_runs(records, task, name) if record.test is not None}
        for name in (method, base)
    ]
    return difference(*signed)


def validation_gain(records: Sequence[Record], task: str, variant: str) -> Difference:
    """The gain of a variant of HRA over its defaults on the validation split, each at its own learning rate."""
    sign = 1 if TASKS[task].higher_is_better else -1
    values = []
    for method in (variant, "hra"):
        wanted = chosen(records, task, method), matched_rank(records, task, method)
        runs = [run for run in of(records, task, method) if (run.lr, run.r) == wanted and run.seed in TRIAL_SEEDS]
        values.append({run.seed: sign * run.validation for run in runs})
    return difference(*values)


def retention_gain(records: Sequence[Record], task: str, method: str, base: str, name: str) -> Difference:
    """How much more of `name` a method retains than another; positive is better."""
    sign = -1 if name.startswith("perplexity") else 1
    values = [
        {record.seed: sign * record.retention[name] for record in final_runs(records, task, other)}
        for other in (method, base)
    ]
    return difference(*values)


def compare(records: Sequence[Record], task: str, method: str = "hra") -> Comparison | None:
    """HRA, or a form of it, against LoRA; None while one of them lacks a test."""
    lora, hra, full = (scores(final_runs(records, task, name)) for name in ("lora", method, "full"))
    if not lora or not hra:
        return None
    won = gain(records, task, method, "lora")
    distance = gain(records, task, "full", "lora") if full else None
    closed = won.mean / distance.mean if distance and distance.mean > distance.half else None
    return Comparison(
        task,
        statistics.mean(lora),
        statistics.mean(hra),
        statistics.mean(full) if full else None,
        won,
        distance,
        closed,
        len(hra),
    )
