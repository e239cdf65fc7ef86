"""Compare a stored tensor with another one, up to rounding to the narrower dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.header import StoredTensor, dtype_of


def load(stored: StoredTensor) -> Tensor | None:
    """Read a tensor; `None` if torch has no such dtype."""
    dtype = dtype_of(stored.dtype)
    if dtype is None:
        return None
    with open(stored.file, "rb") as stream:
        stream.seek(stored.start)
        data = bytearray(stream.read(stored.size))
    empty = torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(stored.shape) if data else empty


def holds(stored: StoredTensor, tensor: Tensor) -> bool:
    """Whether the values are equal after rounding the wider dtype to the narrower."""
    own = load(stored) if stored.shape == tuple(tensor.shape) else None
    return own is not None and (torch.equal(tensor.to(own.dtype), own) or torch.equal(own.to(tensor.dtype), tensor))
