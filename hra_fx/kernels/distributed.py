r"""Reflected rows of a `DTensor`, for a Linear with a weight that is split over the processes of a mesh.

Only the reflection is computed here, on local tensors. The product with the weight and its collectives are the same as
in the layer without adapters. The vectors and their gradients are plain tensors that are the same in every process.
With `Z = x F^T` and `h = x + Z R`:

- Column-wise: `x` and `h` are replicated. The gradient of `h` is summed over the processes, instead of that of `x`.
- Row-wise: each process has some columns of `x`, `R` and `F`. `Z` (`k` numbers per token) and its gradient are summed
  over the processes. The gradients of the columns of `R` and `F` are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_rows


def reflect_distributed(x: Any, factors: Factors) -> Any:
    """Apply a chain to the rows of a `DTensor`: `x Q^T`, in the dtype of `x` and split like `x`.

    `x` is on a one-dimensional mesh: replicated, or split along its last or another dimension. The factors are plain
    tensors that are the same in every process.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, last = x.device_mesh, x.dim() - 1
    if any(placement.is_shard(last) for placement in x.placements):
        own = _replicated(torch.stack(factors), mesh).redistribute(placements=[Shard(2)]).to_local()
        reflected = _reflect_columns(x.to_local(), own, mesh)
    elif any(placement.is_shard() for placement in x.placements):
        own = _replicated(torch.stack(factors), mesh).to_local(grad_placements=[Partial()])
        reflected = reflect_rows(x.to_local(), Factors(*own))
    else:
        x = x.redistribute(placements=[Replicate()] * mesh.ndim)
        reflected = reflect_rows(x.to_local(), factors)
    return as_dtensor(reflected, mesh, x.placements, x.shape)


def as_dtensor(local: Tensor, mesh: Any, placements: Any, shape: Any) -> Any:
    """Create a contiguous `DTensor` of this shape from the parts of all processes, which may differ in size."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def rotate_distributed(weight: Any, factors: Factors) -> Any:
    """Compute the rotated weight `W Q` of a `DTensor` `(out, d)`, with the same split."""
    return reflect_distributed(weight, Factors(rows=factors.down, down=factors.rows))


def _reflect_columns(x: Tensor, factors: Tensor, mesh: Any) -> Tensor:
    """Some columns of `x Q^T`, from the same columns of `x` and of the stacked factors `R` and `F`."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    rows, down = factors.unbind()
    partial: Any = DTensor.from_local(x.to(rows.dtype) @ down.mT, mesh, [Partial()], run_check=False)
    summed = partial.redistribute(placements=[Replicate()]).to_local()
    # Each process uses the sum for its own columns, and has a part of the gradient of the sum.
    projected: Tensor = _replicated(summed, mesh).to_local(grad_placements=[Partial()])
    return x + (projected @ rows).to(x.dtype)


def _replicated(tensor: Tensor, mesh: Any) -> Any:
    """Convert a tensor that is the same in every process to a `DTensor`. It gets the sum of all gradients."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
