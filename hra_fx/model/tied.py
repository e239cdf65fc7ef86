"""Tensors of a model that share memory: changing one changes the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.compat import is_wrapper_subclass


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
    if not weights:
        return {}
    held: dict[tuple[object, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in _tensors(model):
        held.setdefault(_storage(tensor), []).append((name, tensor))
    found: dict[str, list[str]] = {}
    for name, weight in ((name, _plain(weight)) for name, weight in weights.items()):
        others = [
            other for other, tensor in held.get(_storage(weight), []) if other != name and _overlap(weight, tensor)
        ]
        if others:
            found[name] = others
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if tensor is not None and not is_lazy(tensor) and not tensor.is_meta:
                    yield f"{path}.{name}".lstrip("."), _plain(tensor)


def _plain(tensor: Any) -> Tensor:
    """A tensor with memory of its own: a wrapper, as a quantised weight is, shares what the first in it shares."""
    while is_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, names[0])
    return tensor  # type: ignore[no-any-return]


def _storage(tensor: Tensor) -> tuple[object, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(length) * tensor.element_size()
