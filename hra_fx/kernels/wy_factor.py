"""The factor `T` of a chain for the kernels, and the mask that makes `T^-1` of a Gram matrix."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.prefetch import get_or_compute

# Half of the squared lengths that are safe in float32; vectors of other lengths are normalized first.
_SAFE_RANGE = (1e-20, 1e20)
_WIDE = (torch.float32, torch.float64)


def scaled_chain_and_factor(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same reflections by vectors whose lengths are safe in the products, and their factor.

    Args:
        vectors: `U: (d, k)`, of any lengths.
        dtype: the dtype of the products.

    Returns:
        `U: (d, k)`, unchanged where possible, and `T: (k, k)`, a constant to autograd; both at least float32.
    """
    chain = vectors if vectors.dtype in _WIDE else vectors.to(householder.working_dtype(vectors.dtype))
    if chain.is_inference() and not torch.is_inference_mode_enabled():  # autograd cannot save inference tensors
        chain = chain.clone()
    # On a GPU, looking at the lengths would synchronize with the device.
    if dtype in _WIDE and chain.is_cpu and (factor := get_or_compute(compute_factors, chain)) is not None:
        return chain, factor
    chain = householder.normalize(chain)
    with torch.no_grad():
        return chain, householder.compact_wy(chain)


def compute_factors(sources: Sequence[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """The factor `T: (k, k)` of each chain, a constant to autograd; `None` if its lengths are not safe.

    Args:
        sources: `(U,)` with `U: (d, k)` for each, all of one shape and dtype, on the CPU.
    """
    with torch.no_grad():
        grams = [torch.mm(chain.mT, chain) for (chain,) in sources]
        mask, identity = _cpu_masks(grams[0].shape[0], grams[0].dtype)
        inverse = (torch.stack(grams) if len(grams) > 1 else grams[0].unsqueeze(0)).mul_(mask)
        halves = inverse.diagonal(dim1=-2, dim2=-1).tolist()
        factors = torch.linalg.solve_triangular(inverse, identity.expand_as(inverse), upper=True).unbind()
    low, high = _SAFE_RANGE
    return [factor if low < min(own) and max(own) < high else None for factor, own in zip(factors, halves, strict=True)]


def gram_mask(matrix: Tensor) -> Tensor:
    """`M: (k, k)` like `matrix`, with ones above the diagonal and halves on it: `T^-1 = M o U^T U`."""
    size, dtype, device = matrix.shape[0], matrix.dtype, matrix.device
    return _cpu_masks(size, dtype)[0] if device.type == "cpu" else _masks(size, dtype, device)[0]


@functools.cache
def _cpu_masks(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cached, because creating them would take as long as a product of rows."""
    with torch.inference_mode(False):
        return _masks(size, dtype, torch.device("cpu"))


def _masks(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    identity = torch.eye(size, dtype=dtype, device=device)
    return torch.ones_like(identity).triu(1) + identity / 2, identity
