"""Reads of a weight that neither a source nor a graph told of, seen while a forward runs.

`hra_fx.inert` reads sources and `hra_fx.capture.reads` graphs. What is left is a forward that cannot be traced and
takes a weight by a way that its source does not show (an alias, a loop, a helper of another file). Every operator that
gets the weight goes by here, at the price of a call to Python for each operator: for one forward, not for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hra_fx.capture.reads import METADATA
from hra_fx.carrier.layer import SiteCarrier
from hra_fx.carrier.swap import original_class
from hra_fx.site import kind_of, weight_name


class WeightWatch(TorchFunctionMode):
    """While it is on, notes who uses the weight of a layer, the layer itself and its reflections apart.

    Attributes:
        found: path of a layer -> `"<module path> (<class>, in <function>)"` of the first reader.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """A watch over layers by path, which carry reflections of their input or are to carry some."""
        super().__init__()
        self.found: dict[str, str] = {}
        self._weights = {id(_weight(layer)): (path, layer) for path, layer in layers.items()}
        self._running: list[tuple[str, nn.Module]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what a function of torch is called with, and call it."""
        if not _is_question(func):
            for value in _tensors((args, kwargs or {})):
                if id(value) in self._weights:
                    self._note(func, *self._weights[id(value)])
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, path: str, layer: nn.Module) -> None:
        if any(module is layer for _, module in self._running):
            return
        where, reader = self._running[-1]
        kind = original_class(reader).__name__
        name = getattr(func, "__name__", str(func))
        self.found.setdefault(path, f"{where or 'the model'} ({kind}, in {name})")

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[WeightWatch]:
        """Watch what is run of `model` inside the block."""
        handles = []
        # Whoever calls it from inside its forward has passed its hooks already.
        self._running = [("", model)]
        for path, module in model.named_modules():
            entry = (path, module)
            handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: self._running.append(entry)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._running.pop()


def _weight(layer: nn.Module) -> Tensor | None:
    return layer.hra_base if isinstance(layer, SiteCarrier) else layer._parameters[weight_name(kind_of(layer))]


def _is_question(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in METADATA or name in ("__get__", "__set__", "requires_grad_", "is_floating_point", "stride")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
