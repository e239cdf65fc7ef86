"""The small matrices of a reflection: `T`, and the mask that makes it of a Gram matrix."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.kernels.prefetch import ready

# Half of the squared lengths for which float32 has room to spare; vectors of others are brought to length one first.
_IN_RANGE = (1e-20, 1e20)
_WIDE = (torch.float32, torch.float64)


def bearable(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same reflections by vectors whose lengths products can bear, and their factor.

    Args:
        vectors: `U: (d, k)`, of any length each.
        dtype: that of the products.

    Returns:
        `U: (d, k)`, itself where nothing has to be done, and `T: (k, k)`, a constant to autograd; float32 or wider.
    """
    chain = vectors if vectors.dtype in _WIDE else vectors.to(householder.working_dtype(vectors.dtype))
    if chain.is_inference() and not torch.is_inference_mode_enabled():  # autograd keeps none of these
        chain = chain.clone()
    # Elsewhere than on a CPU a look at numbers has to wait for them.
    if dtype in _WIDE and chain.is_cpu and (factor := ready(factors_of, chain)) is not None:
        return chain, factor
    chain = householder.normalize(chain)
    with torch.no_grad():
        return chain, householder.compact_wy(chain)


def factors_of(many: Sequence[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """The factor `T: (k, k)` of each chain, a constant to autograd; `None` where its lengths leave the range.

    Args:
        many: `(U,)` with `U: (d, k)` for each, of one shape and dtype, on the CPU.
    """
    with torch.no_grad():
        grams = [torch.mm(chain.mT, chain) for (chain,) in many]
        mask, identity = _kept(grams[0].shape[0], grams[0].dtype)
        inverse = (torch.stack(grams) if len(grams) > 1 else grams[0].unsqueeze(0)).mul_(mask)
        halves = inverse.diagonal(dim1=-2, dim2=-1).tolist()
        factors = torch.linalg.solve_triangular(inverse, identity.expand_as(inverse), upper=True).unbind()
    low, high = _IN_RANGE
    return [factor if low < min(own) and max(own) < high else None for factor, own in zip(factors, halves, strict=True)]


def mask_like(matrix: Tensor) -> Tensor:
    """`M: (k, k)`, ones above the diagonal and halves on it: `T^-1 = M o U^T U`."""
    size, dtype, device = matrix.shape[0], matrix.dtype, matrix.device
    return _kept(size, dtype)[0] if device.type == "cpu" else _made(size, dtype, device)[0]


@functools.cache
def _kept(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """On the CPU, where making them would take as long as a product of rows."""
    with torch.inference_mode(False):
        return _made(size, dtype, torch.device("cpu"))


def _made(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    identity = torch.eye(size, dtype=dtype, device=device)
    return torch.ones_like(identity).triu(1) + identity / 2, identity
