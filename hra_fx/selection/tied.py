"""Find tensors that share memory, such as an output layer that is tied to the embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def tied_to(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Find the other parameters and buffers that overlap a weight in memory: name -> names, for weights that are tied.

    `modules` has each module once.
    """
    by_storage: dict[object, list[tuple[str, range]]] = {}
    for path, module in modules.items() if weights else ():
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and not is_lazy(tensor):
                by_storage.setdefault(_storage(tensor), []).append((f"{path}.{name}".lstrip("."), _elements(tensor)))
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        own = _elements(weight)
        for other, theirs in by_storage.get(_storage(weight), []):
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


def _storage(tensor: Tensor) -> object:
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except RuntimeError:  # lazy, quantized and XLA tensors have no storage; tied parameters are one object
        pointer = 0
    return (tensor.device, pointer) if pointer else id(tensor)


def _elements(tensor: Tensor) -> range:
    """The range of bytes in the storage from the first to the last element; two halves of a buffer are not tied."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return range(start, start + int(length) * tensor.element_size())
