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
from torch import nn

from hra_fx import compat
from hra_fx.errors import CaptureError


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
    (LeViT, EfficientFormer of timm) compute them in each call while TorchScript traces, so the graph computes them too.
    The caller holds the trace lock.
    """
    thread = threading.get_ident()
    enter: Any = torch.autocast.__enter__

    def enter_autocast(context: torch.autocast) -> Any:
        if threading.get_ident() == thread:
            refuse("it runs under its own autocast, which a graph drops")
        return enter(context)

    def is_tracing() -> bool:
        return threading.get_ident() == thread or compat.is_torchscript_tracing()

    with (
        mock.patch.object(torch.autocast, "__enter__", enter_autocast),
        mock.patch.object(torch.jit, "is_tracing", is_tracing, create=True),  # torch will remove it
    ):
        yield


@contextlib.contextmanager
def checked_capture(model: nn.Module) -> Iterator[list[str]]:
    """A block in which `torch.export` captures a call of a model, for a graph that trains as the model does.

    `torch.export` records the operators of the forward. Hooks of the backward pass, the backward of a custom autograd
    function and random numbers of Python are not in its graph, and it does not report them.

    Yields:
        The names of the custom autograd functions that are called in the block.

    Raises:
        CaptureError: the model has backward hooks; or in the block its forward added a hook to a tensor, drew random
            numbers outside of torch or seeded a generator.
    """
    for path, part in model.named_modules():
        if compat.has_backward_hooks(part):
            name = path or type(part).__name__
            raise CaptureError(f"backward hooks are registered for {name}, which a graph drops")
    state, functions, hooks = GraphState(), list[str](), list[str]()
    with _recorded_backward(functions.append, hooks.append):
        yield functions
    if hooks:
        raise CaptureError(hooks[0])
    if state.has_drawn():
        raise CaptureError(
            "it draws random numbers of Python or NumPy, or seeds a generator, which happens once in a capture"
        )


@contextlib.contextmanager
def _recorded_backward(called: Callable[[str], None], hooked: Callable[[str], None]) -> Iterator[None]:
    """A block that reports what this thread adds to the backward pass and a graph of `torch.export` drops."""
    thread = threading.get_ident()
    apply: Any = vars(torch.autograd.Function)["apply"]  # a class method, in Python or in C
    register_hook: Any = torch.Tensor.register_hook

    def reported_apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        # torch runs functions of its own (torch._library, torch._higher_order_ops) for operators that the graph keeps.
        if threading.get_ident() == thread and not kind.__module__.startswith("torch._"):
            called(kind.__name__)
        return apply.__get__(None, kind)(*args, **kwargs)

    def reported_hook(tensor: torch.Tensor, hook: Any) -> Any:
        if threading.get_ident() == thread:
            hooked("it registers a backward hook on a tensor, which a graph drops")
        return register_hook(tensor, hook)

    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(reported_apply)),
        mock.patch.object(torch.Tensor, "register_hook", reported_hook),
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
