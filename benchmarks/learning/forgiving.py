"""How much a wrong learning rate costs: the plan, its metric, and the part of docs/results.md.

The metric was fixed before the runs. For each method, task and learning rate, the lost part is the share of what
training gains at the method's best rate that this rate does not gain: `(best - score) / (best - before)`, from mean
validation scores over the seeds, with the logarithm of a perplexity, and at most 1. Four numbers for each method are
means of lost parts over the tasks: at the best rate of another task (over all pairs of tasks), at 3 times the own best
rate, at a third of it, and over the whole grid.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from learning.plan import Run, untrained
from learning.rates import final_runs
from learning.records import Record, matched_rank, of
from learning.tables import table
from learning.tasks import TASKS
from learning.variants import ALL

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Task -> the seeds, and the methods.
PLAN = {
    "digits": (range(3), ("lora-alpha-r", "lora", "dora", "hra-pairs", "hra-quiet")),
    "newsgroups-retrieval": (range(1), ("lora-alpha-r", "lora", "dora", "oft", "hra-pairs", "hra-quiet")),
    "language": (range(1), ("lora-alpha-r", "lora", "dora", "oft", "hra-pairs", "hra-quiet")),
}

INTRODUCTION = """\
## How much a wrong learning rate costs

The lost part of a rate is the share of what training gains at the method's best rate that it does not gain, from mean
validation scores (of the logarithm of a perplexity): 0% at the best rate, 100% if nothing is learned or the training
diverges. The rates are {rates}. The metric and the rates were fixed before the runs. Seeds: {seeds}.
On newsgroups-retrieval, training gains 3 to 5 points over the head alone, on 500 posts, so its percentages are noisy.

![How much of the best rate's gain each rate gives](results_forgiving.svg)

"""


def missing(records: Sequence[Record]) -> list[Run]:
    """The runs that are still to be made."""
    planned = [
        (task, method, seed, lr)
        for task, (seeds, methods) in PLAN.items()
        for seed in seeds
        for method in methods
        for lr in RATES
    ]
    return [
        Run(task, method, seed, lr, None, test=False)
        for task, method, seed, lr in planned
        if seed not in scores(records, task, method).get(lr, {})
    ]


def scores(records: Sequence[Record], task: str, method: str) -> dict[float, dict[int, float]]:
    """Validation scores by rate and seed, the first of each; larger is better."""
    rank, found = matched_rank(records, task, method), {lr: {} for lr in RATES}  # type: dict[float, dict[int, float]]
    for run in of(records, task, method):
        if run.lr in found and run.r == rank:
            found[run.lr].setdefault(run.seed, utility(task, run.validation))
    return found


def utility(task: str, score: float) -> float:
    """A score of which more is better: an accuracy, or the negative logarithm of a perplexity."""
    return score if TASKS[task].higher_is_better else -math.log(score)


def lost(records: Sequence[Record], task: str, method: str) -> dict[float, float]:
    """Rate -> the lost part, 0 to 1; empty while runs are missing."""
    seeds = PLAN[task][0]
    by_rate = scores(records, task, method)
    if any(seed not in by_seed for by_seed in by_rate.values() for seed in seeds):
        return {}
    means = {lr: statistics.fmean(by_seed[seed] for seed in seeds) for lr, by_seed in by_rate.items()}
    plain = [run.validation for run in final_runs(records, task, untrained(task)) if run.seed in seeds]
    before = utility(task, statistics.fmean(plain))
    best = max(means.values())
    return {lr: min(1.0, (best - mean) / (best - before)) for lr, mean in means.items()}


def summary(found: dict[str, dict[float, float]]) -> list[float]:
    """From task -> lost parts: the four numbers of the metric."""
    best = {task: min(parts, key=lambda lr: parts[lr]) for task, parts in found.items()}
    other = [found[task][best[one]] for task, one in itertools.permutations(found, 2)]
    steps = [[_at(parts, best[task], step) for task, parts in found.items()] for step in (1, -1)]
    whole = [part for parts in found.values() for part in parts.values()]
    return [statistics.fmean(values) for values in (other, *steps, whole)]


def _at(parts: dict[float, float], lr: float, step: int) -> float:
    """The lost part some steps of the grid away; that of its end beyond it."""
    place = RATES.index(lr) + step
    return parts[RATES[min(max(place, 0), len(RATES) - 1)]]


def section(records: Sequence[Record]) -> str:
    """The text; empty while runs are missing."""
    methods = PLAN["language"][1]
    rows, grids = [], []
    for method in methods:
        found = {task: lost(records, task, method) for task, (_, planned) in PLAN.items() if method in planned}
        if not all(found.values()):
            continue
        rows.append([ALL[method].label, *(f"{100 * part:.0f}%" for part in summary(found))])
        for task, parts in found.items():
            grids.append([f"{task}, {ALL[method].label}", *(f"{100 * parts[lr]:.0f}%" for lr in RATES)])
    if not rows:
        return ""
    columns = ["method", "best rate of another task", "3 times the best rate", "a third of it", "all rates"]
    seeds = ", ".join(f"{len(seeds)} for {task}" for task, (seeds, _) in PLAN.items())
    text = INTRODUCTION.format(rates=", ".join(f"{lr:g}" for lr in RATES), seeds=seeds)
    return f"{text}{table(columns, rows)}\n{table(['lost part at', *(f'{lr:g}' for lr in RATES)], sorted(grids))}"
