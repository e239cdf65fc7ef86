r"""The change that a chain of reflections makes to a weight, as a product of two thin matrices: its LoRA form.

A chain `U: (d, k)` has `Q - I = -U T U^T` (see `hra_fx.functional.householder`), so the change of a weight has a rank
of at most `k`:

    W Q - W = -(W U) T U^T = B A,        A: (n, d),  B: (out, n),  n <= k

This is exactly a LoRA of rank `n` and scale 1. It is computed in three steps without any `(d, d)` matrix:

1. `core`: a thin QR `U = V R` gives `Q - I = V K V^T` with the small core `K = -R T R^T` (`householder.span`).
2. `project` computes `W V`.
3. `low_rank_delta`: a thin QR of `(W V) K` and an SVD of its small triangle give the singular values of the change.
   These show its numerical rank and give the best approximation of a smaller rank (Eckart and Young 1936,
   https://doi.org/10.1007/BF02288367). They are split evenly between the factors, so that half precision rounds both
   factors equally.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional.householder import normalize, span
from hra_fx.functional.rotate import widest_dtype

#: Singular values below this fraction of the largest one are rounding errors of float32 factors.
_NEGLIGIBLE = 2.0**-27
#: The number of rows of a weight that are converted at a time.
_BLOCK = 256


class LowRankDelta(NamedTuple):
    """The change of a weight, `W Q - W = B A`.

    Attributes:
        A: `(n, d)`, with orthogonal rows.
        B: `(out, n)`, with orthogonal columns that have the same lengths as the rows of `A`.
        error: `|W Q - W - B A|_F / |W Q - W|_F` of an approximation of a smaller rank, otherwise 0.
    """

    A: Tensor
    B: Tensor
    error: float


def core(chain: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the small core of `Q - I = V K V^T`.

    Returns:
        `V: (d, m)` with `V^T V = I` and `K: (m, m)`, `m <= min(d, k)`; float64 on the CPU, detached. `m = 0` if `Q`
        is the identity up to the rounding of float64.
    """
    # Two steps, because some devices (mps) do not support float64.
    V, moved = span(normalize(chain.detach().cpu().double()))
    K = -moved
    tiny = 8 * chain.shape[1] * torch.finfo(K.dtype).eps
    if not K.numel() or float(torch.linalg.matrix_norm(K, 2)) <= tiny:
        return V[:, :0], K[:0, :0]
    return V, K


def project(rows: Tensor, V: Tensor) -> Tensor:
    """Compute `W V: (out, m)`, float64 on the CPU, without a copy of `W: (out, d)` in that dtype.

    `W` may have any floating-point dtype, on any device. On MPS, the product is computed in float32.
    """
    dtype = widest_dtype(rows.device)
    wide = V.to(rows.device, dtype)
    return torch.cat([block.to(dtype) @ wide for block in torch.split(rows, _BLOCK)]).cpu().double()


def low_rank_delta(projected: Tensor, V: Tensor, K: Tensor, rank: int | None = None) -> LowRankDelta:
    """Compute the factors of `W Q - W = (W V) K V^T`, with its numerical rank.

    The factors are float64, of rank at most `rank`, or 0 if the change is zero. `V` and `K` come from `core`.

    Example:
        >>> W, U = torch.tensor([[2.0, 5.0]], dtype=torch.float64), torch.tensor([[3.0], [0.0]])
        >>> V, K = core(U)
        >>> A, B, error = low_rank_delta(W @ V, V, K)
        >>> (W + B @ A).round(decimals=6), error
        (tensor([[-2.,  5.]], dtype=torch.float64), 0.0)
    """
    G, triangle = torch.linalg.qr(projected @ K)
    left, sigma, right = torch.linalg.svd(triangle, full_matrices=False)
    if not sigma.numel():
        return LowRankDelta(V.mT[:0], projected[:, :0], 0.0)
    tiny = max(_NEGLIGIBLE * float(sigma[0]), 8 * len(K) * torch.finfo(K.dtype).eps * float(projected.norm()))
    numerical = int((sigma > tiny).sum())
    kept = numerical if rank is None else min(rank, numerical)
    root = sigma[:kept].sqrt()
    A = root[:, None] * (V @ right[:kept].mT).mT
    B = (G @ left[:, :kept]) * root
    lost = float(sigma[kept:numerical].norm() / sigma.norm()) if numerical else 0.0
    return LowRankDelta(A.contiguous(), B.contiguous(), lost)
