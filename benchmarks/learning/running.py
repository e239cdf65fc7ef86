"""Make runs that the file of records lacks, several side by side."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import cast

from speed.environment import commit

from learning.records import Record, read, write
from learning.tasks import TASKS
from learning.training import run


@dataclass(frozen=True)
class Run:
    """The arguments of `training.run`."""

    task: str
    method: str
    seed: int
    lr: float
    r: int | None = None
    test: bool = True
    float32: bool = False

    def is_among(self, records: Iterable[Record]) -> bool:
        """Whether one of the records is of this run; in tests, one that has all that a run measures now."""
        mine = self.task, self.method, self.seed, self.lr
        return any(
            (one.task, one.method, one.seed, one.lr) == mine
            and self.r in (None, one.r)
            and (not self.test or (one.test is not None and one.moved is not None))
            for one in records
        )


def run_all(runs: Iterable[Run], jobs: int) -> None:
    """Make the runs that are missing, and write the records of each when it ends.

    Stop it at any time: the next call continues from the existing records.

    Args:
        runs: what should be there.
        jobs: runs side by side.

    Raises:
        SystemExit: the process of a run failed or was killed.
    """
    commit()  # of the code that is imported now, which the processes inherit
    todo = [planned for planned in runs if not planned.is_among(read())]
    running: dict[Connection, Run] = {}
    while todo or running:
        while todo and len(running) < jobs:
            planned = todo.pop(0)
            TASKS[planned.task](0).model()  # what tasks cache is read once, and each process gets a copy
            running[started(planned)] = planned
        for done in cast(list[Connection], wait(list(running))):
            planned = running.pop(done)
            try:
                records = done.recv()
            except EOFError:
                raise SystemExit(f"The process of a run ended without a result: {planned}") from None
            write([*read(), *records])
            print(*records, sep="\n", flush=True)


def started(planned: Run) -> Connection:
    """Start a run in a process of its own, so that its peak memory is its own; return where its records arrive."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    fork.Process(target=lambda: sender.send(run(*dataclasses.astuple(planned))), daemon=True).start()
    sender.close()  # the process has the only other end: if it is killed, `recv` raises EOFError
    return receiver
