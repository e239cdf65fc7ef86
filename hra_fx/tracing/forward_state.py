"""State that a forward changes or depends on, but a graph does not record.

This includes grad mode, autocast, saved-tensor hooks, random generators, backward hooks, custom autograd functions, and
the attributes of modules.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import CaptureError
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import preserve_rng_state

#: fx and torch.export patch classes for the whole process while they trace.
LOCK = threading.RLock()


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
def checked_capture(model: nn.Module) -> Iterator[None]:
    """Context manager in which `torch.export` captures a call of a model, for a graph that trains like the model.

    `torch.export` records the operators of the forward. Its graph does not contain backward hooks or Python's random
    numbers, and it does not report them.
    """
    for path, part in model.named_modules():
        if compat.has_backward_hooks(part):
            name = path or type(part).__name__
            raise CaptureError(f"backward hooks are registered for {name}, which a graph drops")
        if getattr(part, "gradient_checkpointing", False) is True:
            raise CaptureError(f"{path or 'it'} checkpoints its activations, which a graph drops. Disable that first")
    state, hooks = GraphState(), list[Any]()
    register_hook: Any = Tensor.register_hook

    def reported_hook(tensor: Tensor, hook: Any) -> Any:
        hooks.append(hook)
        return register_hook(tensor, hook)

    with preserve_rng_state(), mock.patch.object(Tensor, "register_hook", reported_hook):
        yield
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
            if isinstance(value, Tensor) and not value.is_inference()  # inference tensors have no version
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


# --- gradients --------------------------------------------------------------------------------------------------------
# A captured graph drops the backward of custom autograd functions. So the gradients of the model and its graph are
# compared: y = layer(x) is run as y = layer(x) + z for each layer that can be adapted, with zeros z. The gradients of z
# are all that adapters get from the layers after them, so they do not depend on which parameters are frozen.


def compare_gradients(model: nn.Module, made: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> None:
    """Compare the gradients of a model and its graph.

    `run` runs the example with a module, and returns the tensors in its result. If the model calls custom autograd
    functions, gradients that are zeros in both are not equal: behind a ReLU, another example may show a difference.
    """
    with torch.enable_grad():
        try:
            with _called_functions() as called:
                zeros, outputs = _run_with_zeros(model, partial(run, model))
        except RuntimeError as error:
            raise CaptureError(f"it does not run with gradients: {str(error).splitlines()[0]}") from error
        # Only the backward graph shows `apply = Function.apply`, and only calls show functions without gradients.
        names = ", ".join(sorted(called | autograd_functions(outputs)))
        wanted, wrong = None, list(zeros)
        with contextlib.suppress(RuntimeError):  # an output does not have a backward pass
            wanted = _gradients(zeros, outputs)
            found = _gradients(*_run_with_zeros(model, partial(run, made)))
            wrong = [path for path in wanted if not _same(found.get(path, []), wanted[path], zeros_too=not names)]
    if wrong and names:
        raise CaptureError(f"it calls the custom autograd function {names}, whose backward a graph drops")
    if wrong and wanted is not None:
        raise CaptureError(f"the output of {wrong[0]} gets another gradient in its graph")


@contextlib.contextmanager
def _called_functions() -> Iterator[set[str]]:
    """Context manager that collects the names of the custom autograd functions that are called."""
    names = set[str]()
    apply: Any = vars(torch.autograd.Function)["apply"]  # a class method, in Python or in C

    def reported_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        # torch runs its own functions (torch._library, torch._higher_order_ops) for operators that the graph keeps.
        if not cls.__module__.startswith("torch._"):
            names.add(cls.__name__)
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(reported_apply)):
        yield names


def autograd_functions(outputs: Iterable[Tensor]) -> set[str]:
    """The names of the custom autograd functions in the backward graph of some outputs."""
    seen, todo = set[Any](), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    custom = [type(node) for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)]
    return {cls.__name__.removesuffix("Backward") for cls in custom}


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to half of the digits of their dtype."""
    one, other = one.detach(), other.detach()
    limit = torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() or one.is_complex() else 0.0
    finite = other[other.isfinite()] if limit else other
    scale = float(finite.abs().max()) if limit and finite.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=limit, atol=limit * scale, equal_nan=True)


def _same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], *, zeros_too: bool) -> bool:
    """Whether the gradients of the calls of a layer are equal. Other numbers of calls cannot be compared."""
    if len(found) != len(wanted):  # the graph has the operators of one of the calls
        return True
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not is_close(one, other) or not (zeros_too or other.any()):
            return False
    return True


def _run_with_zeros(model: nn.Module, run: Callable[[], list[Tensor]]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Run with zeros `z`; return those of each layer, in the order of its calls, and the outputs."""
    zeros: dict[str, list[Tensor]] = {}

    def add_zeros(path: str, layer: nn.Module, args: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled()):
            return output
        zeros.setdefault(path, []).append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[path][-1]

    with contextlib.ExitStack() as hooks:
        for path, layer in model.named_modules():
            if find_kind(layer) not in (None, "attention"):
                hooks.enter_context(layer.register_forward_hook(partial(add_zeros, path)))
        return zeros, run()


def _gradients(zeros: dict[str, list[Tensor]], outputs: Iterable[Tensor]) -> dict[str, list[Tensor | None]]:
    """The gradients of `z` for a weighted sum of all outputs."""
    every = [zero for each in zeros.values() for zero in each]
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.requires_grad]
    # A sum of squares would be constant if an output is normalized.
    losses = [(x * torch.arange(x.numel(), device=x.device).view(x.shape).sin().to(x.dtype)).sum() for x in parts]
    found = iter(torch.autograd.grad(losses, every, allow_unused=True) if losses and every else [None] * len(every))
    return {path: [next(found) for _ in each] for path, each in zeros.items()}
