"""Make the runs that the file of results lacks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

from learning import forgiving
from learning.plan import Run, missing
from learning.records import FILE, Record, read, write
from learning.tasks import TASKS
from learning.training import commit, run


def run_all(tasks: Sequence[str], jobs: int, file: Path = FILE, make: Callable[[Run], Record] | None = None) -> None:
    """Make all missing runs of some tasks, several side by side, and write each record when its run ends.

    A run that needs the learning rate of earlier runs comes after them. Stop it at any time: the next call continues
    from the existing records.

    Args:
        tasks: names of tasks.
        jobs: runs side by side.
        file: the file of results.
        make: makes a run; for tests.

    Raises:
        SystemExit: the process of a run failed or was killed.
    """
    commit()  # of the code that is imported now, which the processes inherit
    running: dict[Connection, Run] = {}
    while True:
        records = read(file)
        more = [planned for planned in forgiving.missing(records) if planned.task in tasks]
        todo = [planned for planned in missing(records, tasks) or more if planned not in running.values()]
        for planned in todo[: jobs - len(running)]:
            if make is None:
                TASKS[planned.task](0).model()  # what tasks cache is read once, and each process gets a copy
            running[started(make or make_run, planned)] = planned
        if not running:
            return
        for done in cast(list[Connection], wait(list(running))):
            planned = running.pop(done)
            try:
                record = done.recv()
            except EOFError:
                raise SystemExit(f"The process of a run ended without a result: {planned}") from None
            write([*read(file), record], file)
            print(record, flush=True)


def started(make: Callable[[Run], Record], planned: Run) -> Connection:
    """Start a run in a process of its own, so that its peak memory is its own; return where its record arrives."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    fork.Process(target=lambda: sender.send(make(planned)), daemon=True).start()
    sender.close()  # the process has the only other end: if it is killed, `recv` raises EOFError
    return receiver


def make_run(planned: Run) -> Record:
    """Make one run."""
    return run(planned.task, planned.method, planned.seed, planned.lr, r=planned.r, test=planned.test)
