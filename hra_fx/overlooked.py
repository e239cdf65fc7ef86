"""Reads of a weight that neither a source nor a graph told of, seen while a forward runs.

`hra_fx.inert` reads sources and `hra_fx.tracing.weight_reads` graphs. What is left is a forward that cannot be traced and
takes a weight by a way that its source does not show (an alias, a loop, a helper of another file). Every operator that
gets the weight goes by here, at the price of a call to Python for each operator: for one forward, not for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.target import REFLECTION, kind_of, weight_name
from hra_fx.tracing.weight_reads import METADATA

#: Beside `METADATA`: what may be done with a weight without computing with it.
_QUESTIONS = frozenset(
    (
        *(
            "__set__",
            "__len__",
            "__repr__",
            "__format__",
            "type",
            "requires_grad_",
            "is_contiguous",
            "stride",
            "data_ptr",
        ),
        *("is_floating_point", "is_complex", "is_pinned", "is_shared", "is_inference", "is_sparse", "is_quantized"),
        *("get_device", "storage_offset", "untyped_storage", "nelement", "ndimension"),
    )
)
_MADE_LIKE = frozenset(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "result_type"))
_NEW = frozenset(("new_tensor", "new_zeros", "new_ones", "new_empty", "new_full"))
#: Where only the first argument is more than an example.
_AS_ANOTHER = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as"))
_IDLE = METADATA | _QUESTIONS | _MADE_LIKE | _NEW | {"__get__", "grad"}


class WeightWatch(TorchFunctionMode):
    """While it is on, notes who computes with the weight of a layer, the layer itself and its reflections apart.

    Where the weight is reflected, the layer too gets it by way of its reflections. A module that holds the very
    parameter itself (an embedding, to which an output layer is tied) reads its own.

    Attributes:
        found: path of a layer -> `"<module path> (<class>, in <function>)"` of the first reader.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """A watch over layers of a model, by path, which carry reflections or are to carry some."""
        super().__init__()
        self.found: dict[str, str] = {}
        self._model = model
        self._layers = dict(layers)
        weights = ((path, _weight(layer)) for path, layer in layers.items())
        # With the tensors themselves, for the address of one that is gone is soon another's.
        self._known = {id(weight): (path, weight) for path, weight in weights if weight is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and look at what it was called with."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and isinstance(result, Tensor):  # weight.T, weight.data: another tensor, by another name
            name = getattr(func.__self__, "__name__", name)
        if name not in _IDLE and not _only_scales(name, args):
            for value in _tensors(args[:1] if name in _AS_ANOTHER else (args, kwargs)):
                if (path := self._whose(value)) is not None:
                    self._note(name, value, path, self._layers[path])
        return result

    def _whose(self, value: Tensor) -> str | None:
        """The layer whose weight this is: at the start, or where offloading or sharding put another parameter since."""
        if id(value) in self._known:
            return self._known[id(value)][0]
        if not isinstance(value, nn.Parameter):
            return None
        return next((path for path, layer in self._layers.items() if _weight(layer) is value), None)

    def _note(self, function: str, weight: Tensor, path: str, layer: nn.Module) -> None:
        reader = _running()
        if path in self.found or (reader is not None and reader is layer._modules.get(REFLECTION)):
            return
        on_weight = isinstance(layer, SiteCarrier) and layer.hra_u.on_weight
        if reader is not None and not (reader is layer and on_weight) and _holds(reader, weight):
            return
        reader = self._model if reader is None else reader
        where = next((name for name, module in self._model.named_modules() if module is reader), "")
        self.found[path] = f"{where or 'the model'} ({original_class(reader).__name__}, in {function})"


def _running() -> nn.Module | None:
    """The module whose method has got furthest: the nearest `self` of the calls that led here."""
    frame = sys._getframe(3)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _only_scales(name: str, args: Any) -> bool:
    """`weight.mul_(number)`: the weight changes, and `W Q` with it; rwkv does so from mode to mode."""
    return name in ("mul_", "div_") and len(args) == 2 and isinstance(args[1], (int, float))


def _holds(module: nn.Module, weight: Tensor) -> bool:
    return any(own is weight for own in module._parameters.values())


def _weight(layer: nn.Module) -> Tensor | None:
    """The parameter; `None` where another tool has put something in its place since."""
    return layer._parameters.get(weight_name(kind_of(layer)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
