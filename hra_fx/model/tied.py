"""Find parameters and buffers of a model that share memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.compat import is_wrapper_subclass, state_modules
from hra_fx.layers.accelerate_hooks import stored


def tied_to(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Other parameters and buffers of the model that overlap a weight in memory.

    A layer that is reached by several paths is one layer, and not tied to itself.

    Args:
        model: the model.
        weights: name -> tensor, each a parameter of `model`.

    Returns:
        name -> names of the tensors that it is tied to, where there are any.

    Example:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        ...         self.head.weight = self.embed.weight
        >>> model = Tied()
        >>> tied_to(model, {"head.weight": model.head.weight})
        {'head.weight': ['embed.weight']}
    """
    by_storage: dict[object, list[tuple[str, range]]] = {}
    for name, tensor in _tensors(model) if weights else ():
        by_storage.setdefault(_storage(tensor), []).append((name, _elements(tensor)))
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        plain = _unwrap(weight)
        own = _elements(plain)
        for other, theirs in by_storage.get(_storage(plain), []):
            if other != name and own.start < theirs.stop and theirs.start < own.stop:
                found.setdefault(name, []).append(other)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in state_modules(model):
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if tensor is not None and not is_lazy(tensor):
                    yield f"{path}.{name}".lstrip("."), _unwrap(stored(module, name, tensor))


def _unwrap(tensor: Any) -> Tensor:
    """A tensor with memory of its own: that of a wrapper subclass (a quantized weight) is in the tensors inside it."""
    while is_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, names[0])
    return tensor  # type: ignore[no-any-return]


def _storage(tensor: Tensor) -> object:
    if tensor.is_meta:  # nothing has an address there; tied parameters are one object
        return tensor.device, id(tensor)
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except RuntimeError:  # lazy and XLA tensors have no storage: a tied one is the same object
        return id(tensor)


def _elements(tensor: Tensor) -> range:
    """The bytes of the storage from the first to the last element, so that two halves of a buffer are not tied."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return range(start, start + int(length) * tensor.element_size())
