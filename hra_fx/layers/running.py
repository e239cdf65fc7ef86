"""Which model runs in this thread.

Two things depend on it: while a model runs, the weight of an adapted layer reads as `W Q` (`hra_fx.layers.weight`), and
its layers use the factors that were computed at the start (`hra_fx.layers.batching`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Run:
    """A forward of a model, or a call of `generate`.

    Attributes:
        factors: container of a layer -> its factors that were computed at the start (`hra_fx.layers.batching`).
    """

    def __init__(self, factors: dict[Any, Any] | None = None) -> None:
        """Start with these factors."""
        self.factors = factors or {}

    def is_current(self) -> bool:
        """Whether a forward inside this run can use its factors instead of new ones."""
        return False


class _Running(threading.local):
    """The run of this thread; `None` if no model runs."""

    def __init__(self) -> None:
        # TorchDynamo would guard that a class attribute is not an attribute of the object, which its first call breaks.
        self.run: Run | None = None
        #: The innermost layer that runs a forward of its own, which reads its weight.
        self.layer: Any = None
        #: The weights that the innermost forward of experts has read; `None` outside of such a forward.
        self.experts: dict[Any, Any] | None = None


RUNNING = _Running()
#: A run without factors: of a part of a model that is called alone, or while a tracer records.
WITHOUT_FACTORS = Run()


def during(run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a run, and restore the outer run."""
    outer, RUNNING.run = RUNNING.run, run
    try:
        return function(*args, **kwargs)
    finally:
        RUNNING.run = outer
