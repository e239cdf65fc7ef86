"""Steps that must not be left half done: an interrupt waits until they are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block; in another thread than the main one none arrives anyway.

    Raises:
        KeyboardInterrupt: at the end, where one was held back.

    Example:
        >>> with uninterrupted():
        ...     print("whole")
        whole
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if held:
        raise KeyboardInterrupt
