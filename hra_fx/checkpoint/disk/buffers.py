"""Memory that is used again and again, in any dtype and shape."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Buffers by their use; one grows to the largest size that it was asked for.

    Example:
        >>> buffers = Buffers()
        >>> one, other = buffers.get("x", torch.float32, 2, 3), buffers.get("x", torch.bfloat16, 3, 4)
        >>> other.shape, one.data_ptr() == other.data_ptr()
        (torch.Size([3, 4]), True)
    """

    def __init__(self) -> None:
        """None yet."""
        self._memory: dict[str, Tensor] = {}
        self._shaped: dict[tuple[str, torch.dtype, int, int], Tensor] = {}

    def get(self, use: str, dtype: torch.dtype, rows: int, width: int, spare: int = 0) -> Tensor:
        """`(rows, width)`, with whatever was left in it; rows lie `spare` numbers apart from each other."""
        shape = (use, dtype, rows, width)
        if shape not in self._shaped:
            size = rows * (width + spare) * dtype.itemsize
            if use not in self._memory or self._memory[use].numel() < size:
                self._memory[use] = torch.empty(size, dtype=torch.uint8)
                self._shaped = {known: made for known, made in self._shaped.items() if known[0] != use}
            self._shaped[shape] = self._memory[use][:size].view(dtype).view(rows, width + spare)[:, :width]
        return self._shaped[shape]
