"""Make the runs that the file of results lacks."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from learning.plan import Run, missing
from learning.records import FILE, Record, read, write
from learning.training import run


def run_all(tasks: Sequence[str], jobs: int, file: Path = FILE, make: Callable[[Run], Record] | None = None) -> None:
    """Make all missing runs of some tasks, several side by side, and write each record when its run ends.

    What a run needs of earlier ones, the learning rate, decides which runs come next. Stop it at any time: it goes on
    from the records that are there.

    Args:
        tasks: names of tasks.
        jobs: runs side by side.
        file: the file of results.
        make: makes a run; for tests.
    """
    # A process for each run: its peak memory is its own.
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        running: dict[Run, multiprocessing.pool.AsyncResult[Record]] = {}
        while True:
            for done in [planned for planned, result in running.items() if result.ready()]:
                record = running.pop(done).get()
                write([*read(file), record], file)
                print(record, flush=True)
            todo = [planned for planned in missing(read(file), tasks) if planned not in running]
            if not todo and not running:
                return
            for planned in todo[: jobs - len(running)]:
                running[planned] = pool.apply_async(make or make_run, (planned,))
            while not any(result.ready() for result in running.values()):
                time.sleep(0.02)


def make_run(planned: Run) -> Record:
    """Make one run."""
    return run(planned.task, planned.method, planned.seed, planned.lr, r=planned.r, test=planned.test)
