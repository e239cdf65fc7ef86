"""The command line.

    PYTHONPATH=benchmarks python -m learning                                      # a row for each task
    PYTHONPATH=benchmarks python -m learning --task digits                        # a row for each method
    PYTHONPATH=benchmarks python -m learning --task digits --method lora hra-pairs --seed 0 1 2
    PYTHONPATH=benchmarks python -m learning --task digits --method lora --lr 1e-3 3e-3 1e-2
    PYTHONPATH=benchmarks python -m learning --kept --seed 0 1 2 3 4             # what each method keeps: runs and page

Runs that docs/results.json lacks are made and added to it; stop at any time. Without --lr, a run has the rate that the
records chose, and reads the test split. With --lr or --search, it reads the validation split only, unless --test is
passed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from learning import kept, page
from learning.keeping import ALL
from learning.rates import chosen
from learning.records import Record, read
from learning.running import Run, run_all
from learning.table import task_table, tasks_table
from learning.tasks import TASKS


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, nargs="+", default=[])
    parser.add_argument("--method", choices=ALL, nargs="+", default=[], help="make the runs of these methods")
    parser.add_argument("--seed", type=int, nargs="+", help="seeds of the runs (default 0; with --kept, none)")
    parser.add_argument("--kept", action="store_true", help="write docs/results.md and its picture from the records")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates (default: the one that the records chose)")
    parser.add_argument("--search", action="store_true", help="try the rates that a search starts with")
    parser.add_argument("--r", type=int, help="rank (default: as many parameters as LoRA)")
    parser.add_argument("--test", action="store_true", help="read the test split with --lr too")
    parser.add_argument("--float32", action="store_true", help="compute nothing in bfloat16")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with one thread each (default 2)")
    options = parser.parse_args(arguments)
    if options.method and not options.task:
        parser.error("--method needs --task")
    return options


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """The runs that should be there."""
    records = read()
    for seed in options.seed or [] if options.kept else []:
        yield from (
            Run(task, method, seed, _rate(records, task, method) if lr is None else lr)
            for task, method, lr in kept.wanted()
        )
    for task in options.task:
        for method in options.method:
            rates = options.lr or (ALL[method].rates if options.search else [_rate(records, task, method)])
            test = options.test or not (options.lr or options.search)
            seeds = options.seed or [0]
            yield from (Run(task, method, seed, lr, options.r, test, options.float32) for seed in seeds for lr in rates)


def _rate(records: Sequence[Record], task: str, method: str) -> float:
    """The learning rate that the records chose; 0 for a method that trains nothing."""
    return chosen(records, task, ALL[method].rate_of or method) if ALL[method].rates else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs, and print tables of the records."""
    options = options_of(arguments)
    run_all(planned(options), options.jobs)
    records = read()
    if options.kept:
        page.write(records)
        return 0
    for task in options.task:
        print(f"\n{task}\n\n{task_table(records, task)}")
    if not options.task:
        print(tasks_table(records))
    return 0
