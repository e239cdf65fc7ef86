"""The learning rate of a method, from the records, and what another one costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from learning.records import Record, matched_rank, of
from learning.tasks import TASKS

#: Learning rates at which `lost` compares methods.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: The mean validation score of these seeds decides between rates.
CHOICE_SEEDS = range(3)


def validated(records: Sequence[Record], task: str, method: str) -> dict[float, dict[int, float]]:
    """Validation scores by learning rate, in rising order, and seed, at the rank of the first run."""
    rank = matched_rank(records, task, method)
    found: dict[float, dict[int, float]] = {}
    for record in sorted(of(records, task, method), key=lambda one: one.lr):
        if record.r == rank:
            found.setdefault(record.lr, {}).setdefault(record.seed, record.validation)
    return found


def chosen(records: Sequence[Record], task: str, method: str) -> float:
    """The learning rate of the test scores: the one that most seeds tested, or else the best in validation.

    Raises:
        SystemExit: no rate was tried.
    """
    tried = validated(records, task, method)
    if not tried:
        raise SystemExit(f"{method} has not run on {task} yet. Pass --lr with several rates to choose from.")
    tested = [record.lr for record in of(records, task, method) if record.test is not None]
    most = max(map(tested.count, tested), default=0)
    rates = [lr for lr in tried if tested.count(lr) == most] or list(tried)
    # A mean of other seeds does not compare.
    seeds = max((tried[lr].keys() & {*CHOICE_SEEDS} for lr in rates), key=len) or tried[rates[0]].keys()
    means = {lr: statistics.fmean(tried[lr][seed] for seed in seeds) for lr in rates if {*seeds} <= tried[lr].keys()}
    return max(means, key=lambda lr: sign(task) * means[lr])


def final_runs(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The runs at the chosen rate that read the test split, in order of their seeds; the last one of each seed."""
    tested = [record for record in of(records, task, method) if record.test is not None]
    by_seed = {record.seed: record for record in tested if record.lr == chosen(records, task, method)}
    return [by_seed[seed] for seed in sorted(by_seed)]


def sign(task: str) -> int:
    """1 where a larger score is better, or else -1."""
    return 1 if TASKS[task].higher_is_better else -1


def utility(task: str, score: float) -> float:
    """A score of which more is better: an accuracy, or the negative logarithm of a perplexity."""
    return score if TASKS[task].higher_is_better else -math.log(score)


def lost(records: Sequence[Record], task: str, method: str, seeds: Sequence[int] = (0,)) -> dict[float, float]:
    """Rate -> the share of what training gains at the best rate of `GRID` that this rate does not gain, 0 to 1.

    `(best - score) / (best - before)`, of the means of validation scores over the seeds.

    Raises:
        KeyError: a run is missing.
    """
    tried = validated(records, task, method)
    at = {lr: statistics.fmean(utility(task, tried[lr][seed]) for seed in seeds) for lr in GRID}
    untrained = "base" if of(records, task, "base") else "head"
    plain = [run.validation for run in final_runs(records, task, untrained) if run.seed in seeds]
    best, before = max(at.values()), utility(task, statistics.fmean(plain))
    return {lr: min(1.0, (best - score) / (best - before)) for lr, score in at.items()}
