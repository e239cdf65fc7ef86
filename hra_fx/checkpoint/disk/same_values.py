"""Whether a tensor of a file holds the values of another one, but for the rounding to a narrower dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.header import Stored, dtype_of


def load(stored: Stored) -> Tensor | None:
    """A tensor of a file; `None` where its dtype is not a usual one."""
    dtype = dtype_of(stored.dtype)
    if dtype is None:
        return None
    with open(stored.file, "rb") as stream:
        stream.seek(stored.start)
        data = bytearray(stream.read(stored.size))
    empty = torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(stored.shape) if data else empty


def holds(stored: Stored, tensor: Tensor) -> bool:
    """Whether the values are equal once the wider of the two is rounded to the narrower."""
    own = load(stored) if stored.shape == tuple(tensor.shape) else None
    return own is not None and (torch.equal(tensor.to(own.dtype), own) or torch.equal(own.to(tensor.dtype), tensor))
