"""How a learning rate is chosen: by the validation score of seed 0, from a grid that gets finer around the best one."""

from __future__ import annotations

from collections.abc import Sequence

from learning.records import Record, matched_rank, of
from learning.tasks import TASKS
from learning.variants import ALL, VARIANTS, VARIED

#: Tasks that use the learning rates of another one.
RATES_FROM = {"newsgroups-5000": "newsgroups-1600"}
#: Tasks whose grid starts at the learning rate that was chosen for another one.
RATES_NEAR = {"language-1024": "language", "language-4-passes": "language"}
#: Tasks and methods whose scores are drawn over all learning rates.
WIDE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WIDE_TASKS, WIDE_METHODS = ("language", "newsgroups-1600"), ("lora", "hra-pairs")
#: A grid has at most so many rates more than it starts with.
ADDED = 6
#: The digits of rates: steps of about 1.7.
DIGITS = (1.0, 1.7, 3.0, 5.5)


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


def first_rates(records: Sequence[Record], task: str, method: str) -> Sequence[float]:
    """The learning rates that a grid starts with; none while another task has to choose them."""
    if task in RATES_NEAR and ALL[method].rates:
        near = RATES_NEAR[task]
        return () if missing_rates(records, near, method) else (chosen(records, near, method),)
    return WIDE if task in WIDE_TASKS and method in WIDE_METHODS else ALL[method].rates


def missing_rates(records: Sequence[Record], task: str, method: str) -> list[float]:
    """The learning rates that are still to be tried before one can be chosen: its neighbors have to be worse."""
    task = RATES_FROM.get(task, task)
    tried = searched(records, task, method)
    rates = first_rates(records, task, method)
    missing = [lr for lr in rates if lr not in tried]
    if missing or not tried:
        return missing
    lr = best(tried, task)
    added = len(tried) - len(rates)
    return [rate for rate in (below(lr), above(lr)) if rate not in tried][: max(0, ADDED - added)]


def best(tried: dict[float, float], task: str) -> float:
    """The learning rate with the best validation score."""
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(tried, key=lambda lr: sign * tried[lr])


def chosen(records: Sequence[Record], task: str, method: str) -> float:
    """The learning rate that the records chose; 0 for a method that trains nothing.

    Raises:
        SystemExit: no rate was tried.
    """
    method = VARIED if method in VARIANTS else method
    if not ALL[method].rates:
        return 0.0
    tried = searched(records, task, method)
    if not tried:
        raise SystemExit(f"docs/results.json has no learning rate for {method} on {task}. Pass --lr.")
    return best(tried, task)


def final_runs(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The runs with the chosen rate that read the test split, in order of their seeds."""
    found = [record for record in of(records, task, method) if record.test is not None]
    return sorted((record for record in found if record.lr == chosen(records, task, method)), key=lambda r: r.seed)


def above(lr: float) -> float:
    """The next rate whose first digits are among `DIGITS`."""
    power, place = _split(lr)
    return _rate(power, place + 1)


def below(lr: float) -> float:
    """The one before."""
    power, place = _split(lr)
    return _rate(power, place - 1)


def _split(lr: float) -> tuple[int, int]:
    digits, _, power = f"{lr:.1e}".partition("e")
    return int(power), DIGITS.index(float(digits))


def _rate(power: int, place: int) -> float:
    return float(f"{DIGITS[place % len(DIGITS)]}e{power + place // len(DIGITS)}")
