"""Find tensors that share memory, such as an output layer that is tied to the embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.compat import is_traceable_wrapper_subclass


def tied_to(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Find the other parameters and buffers that overlap a weight in memory: name -> names, for weights that are tied.

    `modules` has each module once.
    """
    by_storage: dict[object, list[tuple[str, range]]] = {}
    for name, tensor in _tensors(modules) if weights else ():
        by_storage.setdefault(_storage(tensor), []).append((name, _elements(tensor)))
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        plain = _unwrap(weight)
        own = _elements(plain)
        for other, theirs in by_storage.get(_storage(plain), []):
            if other != name and own.start < theirs.stop and theirs.start < own.stop:
                found.setdefault(name, []).append(other)
    return found


def how_to_untie(entry: str) -> str:
    """Return what to do so that a parameter no longer shares memory, as code; without the final period.

    >>> how_to_untie("blocks.0.weight")[:80]
    'Untie it first: model.blocks[0].weight = torch.nn.Parameter(model.blocks[0].weig'
    """
    place = re.sub(r"\.(\d+)", r"[\1]", f"model.{entry}")
    return (
        f"Untie it first: {place} = torch.nn.Parameter({place}.detach().clone()), and in a transformers model "
        "model.config.tie_word_embeddings = False"
    )


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules.items():
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if tensor is not None and not is_lazy(tensor):
                    yield f"{path}.{name}".lstrip("."), _unwrap(tensor)


def _unwrap(tensor: Any) -> Tensor:
    """Return a tensor that has memory. A wrapper subclass (a quantized weight) has its memory in inner tensors."""
    while is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, names[0])
    return tensor  # type: ignore[no-any-return]


def _storage(tensor: Tensor) -> object:
    if tensor.is_meta:  # tensors on the meta device do not have an address; tied parameters are one object
        return tensor.device, id(tensor)
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except RuntimeError:  # lazy and XLA tensors have no storage; tied parameters are one object
        return id(tensor)


def _elements(tensor: Tensor) -> range:
    """The range of bytes in the storage from the first to the last element; two halves of a buffer are not tied."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return range(start, start + int(length) * tensor.element_size())
