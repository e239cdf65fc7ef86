r"""Reflected rows, and a Linear of these rows, from the factors `R` and `F` of its adapters (`hra_fx.kernels.factors`).

Input side: `y = h W^T + b` with `h = x + Z R`, `Z = x F^T`. Output side, as in LoRA: `y = x W^T + b + Z (R W^T)`. The
output side needs a thin product with `W`, which costs about as much as `k` rows. But if `x` does not need a gradient,
as in the first layers of a model, it does not need a product with `W` in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.kernels.dispatch import is_compiling
from hra_fx.kernels.factors import Factors

# From this number of rows per vector, the thin product with `W` is cheaper than `G W`, as measured on CPUs.
_MIN_ROWS_PER_VECTOR = 4


def reflect_rows(x: Tensor, factors: Factors) -> Tensor:
    """Apply a chain to rows `(..., d)`: `x Q^T`, in the dtype of `x`. The products use the dtype of the factors."""
    rows, down = factors
    flat = x.reshape(-1, x.shape[-1])
    if x.dtype is rows.dtype:
        return torch.addmm(flat, F.linear(flat, down), rows).view(x.shape)
    return (flat + torch.mm(F.linear(flat.to(rows.dtype), down), rows).to(x.dtype)).view(x.shape)


def linear(x: Tensor, factors: Factors, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a Linear of `x: (..., d)` with the weight `W Q`, for factors in the dtype of the products."""
    rows, down = factors
    is_flat = x.dim() == 2
    flat = x if is_flat else x.reshape(-1, x.shape[-1])
    if x.dtype is not rows.dtype:
        output = F.linear(reflect_rows(flat, factors), weight, bias)
    elif rows.requires_grad and not x.requires_grad and _prefers_output_side(x, rows, weight):
        output = torch.addmm(F.linear(flat, weight, bias), F.linear(flat, down), torch.mm(rows, weight.mT))
    else:
        output = F.linear(torch.addmm(flat, F.linear(flat, down), rows), weight, bias)
    return output if is_flat else output.view(*x.shape[:-1], weight.shape[0])


def _prefers_output_side(x: Tensor, rows: Tensor, weight: Tensor) -> bool:
    """Whether the output side is cheaper: if `rows` needs a gradient, `x` does not, and there are many rows."""
    if weight.dtype is not x.dtype or weight.requires_grad or not torch.is_grad_enabled():
        return False
    # A compiler would add a guard on the number of rows and compile twice.
    return is_compiling() or x.numel() >= _MIN_ROWS_PER_VECTOR * rows.numel()
