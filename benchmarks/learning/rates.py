"""How a learning rate is chosen: by validation scores, from a grid that gets finer around the best rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from learning.records import Record, matched_rank, of
from learning.tasks import TASKS
from learning.variants import ALL, BASE_OF

#: Tasks that use the learning rates of another one.
RATES_FROM = {
    **dict.fromkeys(("newsgroups-5000", "newsgroups-retrieval"), "newsgroups-1600"),
    **dict.fromkeys(("language-4-passes", "language-long", "language-4-bit", "language-float32"), "language"),
}
#: Variations with rates of their own, and no others, because their runs take so long.
OWN_RATES = {"language-long": (1.7e-3, 5.5e-3)}
#: Variations in which all methods have the same rate, the best one of LoRA.
SAME_RATE = {"language-4-passes": 5.5e-3, "language-4-bit": 5.5e-3}
#: Tasks and methods whose scores are drawn over all learning rates.
WIDE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WIDE_TASKS, WIDE_METHODS = ("language", "newsgroups-1600"), ("lora", "hra-pairs")
#: At most this many rates are added to the first ones.
ADDED = 6
#: The mean validation score of these seeds decides between the best rate of seed 0 and its neighbors.
CHOICE_SEEDS = range(3)
#: Methods whose rates seed 0 alone decides on `WIDE_TASKS`, because their runs take so long.
ONE_SEED_METHODS = ("dora", "oft", "psoft", "road", "miss", "full")
#: The digits of rates: steps of about 1.7.
DIGITS = (1.0, 1.7, 3.0, 5.5)


def searched(records: Sequence[Record], task: str, method: str) -> dict[float, float]:
    """Validation scores of seed 0 by learning rate, in rising order."""
    return {lr: by_seed[0] for lr, by_seed in _scores(records, task, method).items() if 0 in by_seed}


def _scores(records: Sequence[Record], task: str, method: str) -> dict[float, dict[int, float]]:
    """Validation scores by learning rate, in rising order, and seed; means where a run was repeated."""
    task = _with_rates(task)
    usual = matched_rank(records, task, method)
    found: dict[float, dict[int, list[float]]] = {}
    for record in of(records, task, method):
        if record.r == usual:
            found.setdefault(record.lr, {}).setdefault(record.seed, []).append(record.validation)
    return {
        lr: {seed: statistics.fmean(scores) for seed, scores in seeds.items()} for lr, seeds in sorted(found.items())
    }


def _with_rates(task: str) -> str:
    """The task whose rates a task has."""
    return task if task in OWN_RATES else RATES_FROM.get(task, task)


def means(records: Sequence[Record], task: str, method: str) -> dict[float, float]:
    """The mean validation scores of the learning rates that all of `CHOICE_SEEDS` have tried."""
    return {
        lr: statistics.mean(by_seed[seed] for seed in CHOICE_SEEDS)
        for lr, by_seed in _scores(records, task, method).items()
        if by_seed.keys() >= set(CHOICE_SEEDS)
    }


def first_rates(task: str, method: str) -> Sequence[float]:
    """The learning rates that a grid starts with."""
    wide = WIDE if task in WIDE_TASKS and method in WIDE_METHODS else ALL[method].rates
    return OWN_RATES.get(task, wide)


def missing_rates(records: Sequence[Record], task: str, method: str) -> list[tuple[float, int]]:
    """The learning rates, and seeds, that are still to be tried before a rate can be chosen.

    Seed 0 tries a grid, and then the neighbors of its best rate. `CHOICE_SEEDS` try the best rate and its neighbors,
    until the best mean has neighbors that are worse, except for `ONE_SEED_METHODS`.
    """
    task = _with_rates(task)
    tried = searched(records, task, method)
    rates = first_rates(task, method)
    missing = [(lr, 0) for lr in rates if lr not in tried]
    if missing or not tried or not rates or task in OWN_RATES:
        return missing
    most = max(0, len(rates) + ADDED - len(tried))
    if missing := [(lr, 0) for lr in _around(best(tried, task)) if lr not in tried][:most]:
        return missing
    if task in WIDE_TASKS and method in ONE_SEED_METHODS:
        return []
    done = _scores(records, task, method)
    for choose in (searched, means):
        around = _around(best(choose(records, task, method), task))
        wanted = [lr for lr in around if lr in tried or most]
        if missing := [(lr, seed) for lr in wanted for seed in CHOICE_SEEDS if seed not in done.get(lr, {})]:
            return missing
    return []


def _around(lr: float) -> tuple[float, float, float]:
    return below(lr), lr, above(lr)


def best(tried: dict[float, float], task: str) -> float:
    """The learning rate with the best validation score."""
    sign = 1 if TASKS[task].higher_is_better else -1
    return max(tried, key=lambda lr: sign * tried[lr])


def chosen(records: Sequence[Record], task: str, method: str) -> float:
    """The learning rate that the records chose; 0 for a method that trains nothing.

    Raises:
        SystemExit: no rate was tried.
    """
    method = BASE_OF.get(method, method)
    if not ALL[method].rates:
        return 0.0
    if task in SAME_RATE:
        return SAME_RATE[task]
    tried = searched(records, task, method)
    if not tried:
        raise SystemExit(f"docs/results.json has no learning rate for {method} on {task}. Pass --lr.")
    return best(means(records, task, method) or tried, task)


def final_runs(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The runs with the chosen rate that read the test split, in order of their seeds; the last one of each seed."""
    found = [record for record in of(records, task, method) if record.test is not None]
    by_seed = {record.seed: record for record in found if record.lr == chosen(records, task, method)}
    return [by_seed[seed] for seed in sorted(by_seed)]


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
