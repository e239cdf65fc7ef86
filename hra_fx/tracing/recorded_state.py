"""State that a graph does not record: grad mode, autocast, saved-tensor hooks and random generators."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import torch

from hra_fx import compat


class GraphState:
    """The state at the start of a trace. A forward that changes it cannot be represented by a graph."""

    def __init__(self) -> None:
        """Save the state of this thread."""
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast()
        self._hooks = compat.has_saved_tensors_hooks()
        self._random = _Random()

    def why_not(self) -> str | None:
        """The reason why no node can be recorded now, or `None`."""
        if torch.is_grad_enabled() != self._grad:
            # A custom autograd function runs its forward without gradients too.
            return "it changes grad mode or calls a custom autograd function, which a graph drops"
        if _autocast() != self._autocast:
            return "it runs under its own autocast, which a graph drops"
        if compat.has_saved_tensors_hooks() != self._hooks:
            return "it checkpoints activations or changes what is saved for backward, which a graph drops"
        return None

    def has_drawn(self) -> bool:
        """Whether random numbers were drawn, or a generator was seeded. The generators are restored."""
        if self._random.is_unchanged():
            return False
        self._random.restore()
        return True


@contextlib.contextmanager
def patched(refuse: Callable[[str], NoReturn]) -> Iterator[None]:
    """A block in which this thread must not enter autocast, and `torch.jit.is_tracing()` returns True for it.

    A block that disables autocast where it is off already would change no state. Models that cache values between calls
    compute them in each call while TorchScript traces, so the graph computes them too. The caller holds the trace lock.
    """
    thread = threading.get_ident()
    enter: Any = torch.autocast.__enter__
    was_tracing: Any = vars(torch.jit)["is_tracing"]

    def enter_autocast(context: torch.autocast) -> Any:
        if threading.get_ident() == thread:
            refuse("it runs under its own autocast, which a graph drops")
        return enter(context)

    def is_tracing() -> bool:
        return threading.get_ident() == thread or was_tracing()

    with (
        mock.patch.object(torch.autocast, "__enter__", enter_autocast),
        mock.patch.object(torch.jit, "is_tracing", is_tracing),
    ):
        yield


class _Random:
    """The states of the generators of torch, Python and NumPy."""

    def __init__(self) -> None:
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), _numpy_state()

    def is_unchanged(self) -> bool:
        return (
            torch.equal(self._torch, torch.get_rng_state())
            and self._python == random.getstate()
            and self._numpy == _numpy_state()
        )

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            name, keys, *rest = self._numpy
            numpy: Any = sys.modules["numpy"]
            numpy.random.set_state((name, numpy.frombuffer(keys, dtype="uint32"), *rest))


def _numpy_state() -> tuple[Any, ...] | None:
    """A state that compares by value, if NumPy is imported."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, *rest = numpy.random.get_state()
    return (name, keys.tobytes(), *rest)


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
