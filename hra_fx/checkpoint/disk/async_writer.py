"""Writing behind the back of who computes: one thread turns weights, and the kernel writes them in another one.

Both copying into the page cache and waiting for the disk take the kernel as long as a rotation takes the processor. The
second thread only calls the kernel, and a third one waits for the disk, so that the last `fsync` has little left to do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

from hra_fx.checkpoint.disk.streams import write_all

#: Bytes after which the disk is told to begin.
_PORTION = 1 << 26


class Behind:
    """A file that is written behind; a context, at whose end all is written.

    Args:
        target: the file, unbuffered.
    """

    def __init__(self, target: BinaryIO) -> None:
        """Nothing is written yet."""
        self.target = target
        self._writer = ThreadPoolExecutor(1, "hra_fx-write")
        self._flusher = ThreadPoolExecutor(1, "hra_fx-flush")
        self._steps: deque[Future[None]] = deque()
        self._later: deque[tuple[Callable[[], object], int]] = deque()
        self._flush: Future[None] | None = None
        self._written = 0

    def __enter__(self) -> Behind:
        """The file itself."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Wait; what failed behind is raised here, if not before."""
        try:
            while self._later and error is None:
                self.then(*self._later.popleft())
        finally:
            self._writer.shutdown(wait=True, cancel_futures=error is not None)
            self._flusher.shutdown(wait=True, cancel_futures=True)
        if error is None:
            for step in self._steps:
                step.result()

    def write(self, at: int, data: Any) -> None:
        """Write bytes from `at` on, and do one of the things that have time."""
        self.then(partial(write_all, self.target, data, at), len(data))
        if self._later:
            self.then(*self._later.popleft())

    def later(self, step: Callable[[], object], size: int) -> None:
        """Have `step` done between writes, at the end at the latest."""
        self._later.append((step, size))

    def then(self, step: Callable[[], object], size: int) -> Future[None]:
        """Have `step` done after all before it; it writes `size` bytes. What failed before is raised."""
        while self._steps and self._steps[0].done():
            self._steps.popleft().result()
        self._steps.append(self._writer.submit(self._do, step, size))
        return self._steps[-1]

    def _do(self, step: Callable[[], object], size: int) -> None:
        step()
        self._written += size
        if self._written >= _PORTION and (self._flush is None or self._flush.done()):
            self._written = 0
            self._flush = self._flusher.submit(os.fsync, self.target.fileno())
