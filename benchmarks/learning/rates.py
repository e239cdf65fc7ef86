"""How a learning rate is chosen: from a grid, by the validation score of seed 0."""

from __future__ import annotations

from collections.abc import Sequence

from learning.records import Record, matched_rank, of
from learning.tasks import TASKS
from learning.variants import ALL

#: Tasks that use the learning rates of another one.
RATES_FROM = {"newsgroups-5000": "newsgroups-1600"}
#: How often a grid may be extended by one step where its best rate is the first or the last.
EXTENSIONS = 2


def searched(records: Sequence[Record], task: str, method: str) -> dict[float, float]:
    """Validation scores by learning rate, in rising order, from the runs that choose it."""
    task = RATES_FROM.get(task, task)
    usual = matched_rank(records, task, method)
    found = {
        record.lr: record.validation
        for record in of(records, task, method)
        if record.test is None and record.seed == 0 and record.r == usual
    }
    return dict(sorted(found.items()))


def missing_rates(records: Sequence[Record], task: str, method: str) -> list[float]:
    """The learning rates that are still to be tried before one can be chosen."""
    tried = searched(records, task, method)
    rates = ALL[method].rates
    missing = [lr for lr in rates if lr not in tried]
    if missing or not rates or len(tried) >= len(rates) + EXTENSIONS:
        return missing
    lr = best(tried, task)
    if lr == max(tried):
        return [above(lr)]
    return [below(lr)] if lr == min(tried) else []


def best(tried: dict[float, float], task: str) -> float:
    """The learning rate with the best validation score."""
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(tried, key=lambda lr: sign * tried[lr])


def chosen(records: Sequence[Record], task: str, method: str) -> float:
    """The learning rate that the records chose; 0 for a method that trains nothing.

    Raises:
        SystemExit: no rate was tried.
    """
    if not ALL[method].rates:
        return 0.0
    tried = searched(records, task, method)
    if not tried:
        raise SystemExit(f"docs/results.json has no learning rate for {method} on {task}. Pass --lr.")
    return best(tried, task)


def above(lr: float) -> float:
    """The next of 1, 3, 10, 30, ... times a power of ten."""
    digit, _, power = f"{lr:.0e}".partition("e")
    return float(f"3e{power}") if digit == "1" else float(f"1e{int(power) + 1}")


def below(lr: float) -> float:
    """The one before."""
    digit, _, power = f"{lr:.0e}".partition("e")
    return float(f"1e{power}") if digit == "3" else float(f"3e{int(power) - 1}")
