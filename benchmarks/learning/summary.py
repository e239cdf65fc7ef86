"""Statistics of the records: paired differences, and what is retained at an equal score."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from learning.plan import TRIAL_SEEDS
from learning.rates import CHOICE_SEEDS, chosen, final_runs
from learning.records import Record, matched_rank, of
from learning.tasks import TASKS
from learning.variants import VARIED

#: The 97.5% quantile of Student's t distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, half of its 95% interval, and its standard error."""

    mean: float
    half: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """A method against LoRA on a task.

    Args:
        task: its name.
        lora, other: test scores, by seed.
        gain: that of the method over LoRA, positive where it is better, whatever the metric.
    """

    task: str
    lora: list[float]
    other: list[float]
    gain: Difference

    @property
    def holds(self) -> bool:
        """Whether the method's mean is at least LoRA's minus one standard error of the paired difference."""
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
    """The gain of a variant over what it varies on the validation split, at the same learning rate."""
    sign = 1 if TASKS[task].higher_is_better else -1
    wanted = chosen(records, task, VARIED), matched_rank(records, task, VARIED)
    values = []
    for method in (variant, VARIED):
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


def compare(records: Sequence[Record], task: str, method: str = "hra-pairs") -> Comparison | None:
    """A method against LoRA; None while one of them lacks a test."""
    lora, other = (scores(final_runs(records, task, name)) for name in ("lora", method))
    return Comparison(task, lora, other, gain(records, task, method, "lora")) if lora and other else None


def at_equal_score(records: Sequence[Record], task: str, name: str) -> list[tuple[float, float, float]]:
    """For each of `CHOICE_SEEDS`: a validation score, and what LoRA and pairs retain of `name` when they reach it.

    The score is the worse of their scores at the chosen rates. Seeds whose curves do not contain it are left out.
    """
    sign = 1 if TASKS[task].higher_is_better else -1
    found = []
    for seed in CHOICE_SEEDS:
        lora, pairs = (_retention_curve(records, task, method, name, seed) for method in ("lora", "hra-pairs"))
        if not lora or not pairs:
            continue
        score = sign * min(sign * lora[-1][0], sign * pairs[-1][0])
        kept = [retained_at(curve, score) for curve in (lora, pairs)]
        if kept[0] is not None and kept[1] is not None:
            found.append((score, kept[0], kept[1]))
    return found


def _retention_curve(
    records: Sequence[Record], task: str, method: str, name: str, seed: int
) -> list[tuple[float, float]]:
    """Validation scores and what is retained, from a seed's lowest learning rate to the chosen one."""
    rank, most = matched_rank(records, task, method), chosen(records, task, method)
    runs = {run.lr: run for run in of(records, task, method) if (run.seed, run.r) == (seed, rank) and run.lr <= most}
    return [(run.validation, run.retention[name]) for _, run in sorted(runs.items())]


def retained_at(curve: Sequence[tuple[float, float]], score: float) -> float | None:
    """What is retained at a validation score, between two points of a curve; None where the score is not reached."""
    for (one, kept), (other, kept_by_other) in itertools.pairwise(curve):
        if min(one, other) <= score <= max(one, other):
            return kept + (kept_by_other - kept) * (score - one) / ((other - one) or 1.0)
    return None
