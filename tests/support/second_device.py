"""A second device on a machine without one: torch's lazy tensors, which are on `lazy:0` and compute on the CPU.

They mix with CPU tensors as little as those of a GPU do, and a copy from one device to the other is a real one.
"""

from __future__ import annotations

import torch
import torch._lazy.ts_backend
from torch import Tensor

torch._lazy.ts_backend.init()
LAZY = torch.device("lazy:0")
_LIBRARY = torch.library.Library("aten", "IMPL")


# Without these, torch returns tensors that it takes for those of the CPU.
def _unbind(tensor: Tensor, dim: int = 0) -> list[Tensor]:
    return [torch.select_copy(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = tensor.shape[dim]
    return [torch.narrow_copy(tensor, dim, at, min(size, length - at)) for at in range(0, length, size)]


def _split_with_sizes(tensor: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [torch.narrow_copy(tensor, dim, *part) for part in zip(starts, sizes, strict=True)]


_LIBRARY.impl("unbind_copy.int", _unbind, "Lazy")
_LIBRARY.impl("split_copy.Tensor", _split, "Lazy")
_LIBRARY.impl("split_with_sizes_copy", _split_with_sizes, "Lazy")
