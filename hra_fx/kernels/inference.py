"""Reflected rows from precomputed factors, where no gradient is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.backward import down_projection, subtract_low_rank
from hra_fx.kernels.wy_factor import scaled_chain_and_factor


def inference_factors(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors for `reflect_rows_cached`: `U: (d, k)` and `F = T U^T: (k, d)`.

    Args:
        vectors: `U: (d, k)`, of any lengths.
        dtype: the dtype of the products, and of the result.
    """
    with householder.without_autocast(vectors):
        chain, factor = scaled_chain_and_factor(vectors, dtype)
        # In the layout of training, so that both give the same bits.
        return chain.to(dtype), down_projection(chain, factor, dtype)


def reflect_rows_cached(x: Tensor, chain: Tensor, down: Tensor) -> Tensor:
    """`x Q^T: (..., d)`, from the results of `inference_factors`; without gradients.

    Example:
        >>> factors = inference_factors(torch.tensor([[3.0], [0.0]]), torch.float32)
        >>> reflect_rows_cached(torch.tensor([[2.0, 5.0]]), *factors)
        tensor([[-2.,  5.]])
    """
    with householder.without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        return subtract_low_rank(rows, torch.mm(down, rows.to(chain.dtype).mT), chain.mT).view(x.shape)
