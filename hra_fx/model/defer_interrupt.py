"""Steps that must not be left half done: an interrupt waits until they are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Held:
    """A handler that only remembers."""

    def __init__(self) -> None:
        self.frames: list[FrameType | None] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.frames.append(frame)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the outermost of such blocks, and hand it to the handler that was there before.

    In another thread than the main one none arrives anyway.

    Example:
        >>> with uninterrupted():
        ...     print("whole")
        whole
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not in_main or before is None or isinstance(before, _Held):
        yield
        return
    held = _Held()
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held.frames:
            signal.raise_signal(signal.SIGINT)
