"""State that a forward changes or depends on, but a graph does not record.

This includes grad mode, autocast, saved-tensor hooks, random generators, backward hooks, and the attributes of modules.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import nn

from hra_fx import compat
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import preserve_rng_state


class GraphState:
    """The state at the start of a trace. A forward that changes it cannot be represented by a graph."""

    def __init__(self) -> None:
        """Save the state of this thread."""
        self._grad = torch.is_grad_enabled()
        self._autocast = _autocast()
        self._hooks = compat.has_saved_tensors_hooks()
        self._random = _random_states()

    def why_not(self) -> str | None:
        """The reason why no node can be recorded now, or `None`."""
        if torch.is_grad_enabled() != self._grad:
            # A custom autograd function also runs its forward without gradients.
            return "it changes grad mode or calls a custom autograd function, which a graph drops"
        if _autocast() != self._autocast:
            return "it runs under its own autocast, which a graph drops"
        if compat.has_saved_tensors_hooks() != self._hooks:
            return "it checkpoints activations or changes what is saved for backward, which a graph drops"
        return None

    def has_drawn(self) -> bool:
        """Whether random numbers were drawn, or a generator was seeded."""
        return _random_states() != self._random


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _random_states() -> list[Any]:
    """The states of the generators of torch, Python and, if it is imported, NumPy; they compare by value."""
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else ()
    of_numpy = [part.tolist() if hasattr(part, "tolist") else part for part in of_numpy]
    return [torch.get_rng_state().tolist(), random.getstate(), of_numpy]


@contextlib.contextmanager
def patched(refuse: Callable[[str], NoReturn]) -> Iterator[None]:
    """Context manager in which entering autocast is an error, and `torch.jit.is_tracing()` returns True.

    `GraphState` cannot detect a block that disables autocast when it is already off. Models that cache values between
    calls (timm's LeViT, EfficientFormer) compute them in each call while TorchScript traces, so the graph computes them
    too.
    """

    def enter_autocast(context: torch.autocast) -> NoReturn:
        refuse("it runs under its own autocast, which a graph drops")

    with (
        mock.patch.object(torch.autocast, "__enter__", enter_autocast),
        mock.patch.object(torch.jit, "is_tracing", lambda: True, create=True),  # torch will remove it
    ):
        yield


@contextlib.contextmanager
def checked_capture(model: nn.Module) -> Iterator[list[str]]:
    """Context manager in which `torch.export` captures a call of a model, for a graph that trains like the model.

    `torch.export` records the operators of the forward. Its graph does not contain backward hooks, the backward of
    custom autograd functions, or Python's random numbers, and it does not report them.

    Yields:
        The names of the custom autograd functions that are called in the block.

    Raises:
        CaptureError: the model has backward hooks; or in the block, its forward adds a hook to a tensor, uses random
            numbers that are not from torch, or seeds a generator.
    """
    for path, part in model.named_modules():
        if compat.has_backward_hooks(part):
            name = path or type(part).__name__
            raise CaptureError(f"backward hooks are registered for {name}, which a graph drops")
    state, functions, hooks = GraphState(), list[str](), list[Any]()
    apply: Any = vars(torch.autograd.Function)["apply"]  # a class method, in Python or in C
    register_hook: Any = torch.Tensor.register_hook

    def reported_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        # torch runs its own functions (torch._library, torch._higher_order_ops) for operators that the graph keeps.
        if not cls.__module__.startswith("torch._"):
            functions.append(cls.__name__)
        return apply.__get__(None, cls)(*args, **kwargs)

    def reported_hook(tensor: torch.Tensor, hook: Any) -> Any:
        hooks.append(hook)
        return register_hook(tensor, hook)

    with (
        preserve_rng_state(),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(reported_apply)),
        mock.patch.object(torch.Tensor, "register_hook", reported_hook),
    ):
        yield functions
        if hooks:
            raise CaptureError("it registers a backward hook on a tensor, which a graph drops")
        if state.has_drawn():
            raise CaptureError(
                "it draws random numbers from Python or NumPy, or seeds a generator, which happens once in a capture"
            )


class Snapshot:
    """A copy of the attributes of a module and its submodules, for comparing and restoring them."""

    def __init__(self, root: nn.Module) -> None:
        """Save the attributes, the values of tensors in them, and the items of containers, one level deep."""
        self._tensors = [
            (path, name, value, value.detach().clone(), compat.tensor_version(value))
            for path, part in root.named_modules()
            for name, value in vars(part).items()
            if isinstance(value, torch.Tensor) and not value.is_inference()  # inference tensors have no version
        ]
        self._parts = [
            (
                path,
                part,
                dict(vars(part)),
                {name: _copy(value) for name, value in vars(part).items() if isinstance(value, _CONTAINERS)},
            )
            for path, part in root.named_modules()
        ]

    def changes(self) -> list[tuple[str, str]]:
        """(path of the module, name of the attribute) for each attribute that changed, except `training`."""
        found = []
        for path, part, attributes, contents in self._parts:
            now = vars(part)
            names = [name for name in {**attributes, **now} if name != "training"]
            found += [
                (path, name)
                for name in names
                if attributes.get(name, _ABSENT) is not now.get(name, _ABSENT)
                or (name in contents and _items(contents[name]) != _items(now[name]))
            ]
        return found + [
            (path, name) for path, name, tensor, _, version in self._tensors if compat.tensor_version(tensor) != version
        ]

    def is_plain(self, path: str, name: str) -> bool:
        """Whether an attribute is currently a number or a string."""
        part = next(part for where, part, *_ in self._parts if where == path)
        return isinstance(vars(part).get(name), (bool, int, float, str))

    def restore(self) -> None:
        """Restore all attributes."""
        with torch.no_grad():
            for _, _, tensor, before, version in self._tensors:
                if compat.tensor_version(tensor) != version:
                    tensor.copy_(before)
        for _, part, attributes, contents in self._parts:
            for name, value in contents.items():
                if _items(attributes[name]) != _items(value):
                    attributes[name].clear()
                    (attributes[name].extend if isinstance(value, list) else attributes[name].update)(value)
            vars(part).clear()
            vars(part).update(attributes)


_ABSENT = object()
_CONTAINERS = (dict, list, set)


def _copy(container: Any) -> Any:
    """Copy a container, which may have a subclass, to a plain one."""
    return next(cls(container) for cls in _CONTAINERS if isinstance(container, cls))


def _items(container: Any) -> list[Any]:
    """The ids of the items, because tensors cannot be compared for equality."""
    values = container.values() if isinstance(container, dict) else ()
    return [set(container) if isinstance(container, set) else [*map(id, container)], *map(id, values)]
