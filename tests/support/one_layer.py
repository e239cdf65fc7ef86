"""Random inputs, and the dtypes of tests."""

from __future__ import annotations

import torch
from torch import Tensor

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
