r"""The share of a weight that a chain of reflections rotates.

`Q` rotates some directions and keeps all that are orthogonal to them. With `P` the projector on the former, a row of
the weight is `w = w P + w (I - P)`, and `Q` changes the first part only. `|W P|_F^2 / |W|_F^2` is the share of the
weight that the adapter can change, whatever the angles are.

The directions lie in the span of the vectors, `U = V R` (thin QR), where `Q` is the block `B = I - R T R^T`. `I - B` is
normal with the singular values `2 sin(angle / 2)`, so the left singular vectors `G` of the nonzero ones span the
rotated
directions: `P = V G G^T V^T`, and `|W P|_F = |W V G|_F` takes one skinny product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hra_fx.functional.householder import compact_wy, normalize, working_dtype
from hra_fx.functional.statistics import min_angle
from hra_fx.layers.target import as_rows

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How many entries of a weight are cast at a time.
_CHUNK = 1 << 22


def turned_directions(chain: Tensor) -> Tensor:
    """An orthonormal basis of the directions that a chain rotates or reflects.

    Args:
        chain: `U: (d, k)`, finite and not on the meta device.

    Returns:
        `(d, n)` with `n <= min(d, k)`, float64, on the CPU: two columns per plane, one per reflected direction.

    Example:
        >>> turned_directions(torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0]])).abs().round(decimals=6)
        tensor([[0.],
                [1.]], dtype=torch.float64)
    """
    vectors = normalize(chain.detach())
    factor = compact_wy(vectors).to("cpu", torch.float64)
    basis, triangle = torch.linalg.qr(vectors.to("cpu", torch.float64))
    left, sizes, _ = torch.linalg.svd(triangle @ factor @ triangle.mT)
    turned: Tensor = basis @ left[:, sizes > min_angle(chain)]
    return turned


def share_turned(rows: Tensor, chain: Tensor) -> float:
    """`|W P|_F^2 / |W|_F^2`: the share of a weight in the directions that a chain rotates, from 0 to 1.

    It makes no `d x d` matrix, and casts the weight piece by piece, to float32 at least.

    Args:
        rows: `W: (out, d)`, floating.
        chain: `U: (d, k)`.

    Returns:
        The share; 0 for a zero weight, NaN if weight or chain are on the meta device or not finite.

    Example:
        >>> share_turned(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        0.36
    """
    if rows.is_meta or chain.is_meta or not bool(torch.isfinite(chain).all()):
        return math.nan
    if not chain.shape[1]:
        return 0.0
    directions = turned_directions(chain).to(rows.device, working_dtype(rows.dtype))
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    part, whole = (torch.zeros((), dtype=wide, device=rows.device) for _ in range(2))
    for piece in torch.split(rows.detach(), max(1, _CHUNK // max(1, rows.shape[1]))):
        cast = piece.to(directions.dtype)
        for total, matrix in ((part, cast @ directions), (whole, cast)):
            # Row by row: a single sum of millions of float32 values has only three correct digits.
            total += torch.linalg.vector_norm(matrix, dim=1).to(wide).square().sum()
    size = float(whole)
    # Rounding may exceed 1.
    return min(float(part) / size, 1.0) if size else 0.0


def readable_rows(weight: Tensor, width: int, *, columns: bool) -> Tensor | None:
    """A weight as the matrix `(out, d)`, not copied; `None` if it is quantized, packed, sharded or sparse.

    Args:
        weight: a layer's weight.
        width: `d`.
        columns: whether it is stored as `(d, out)`.

    Example:
        >>> readable_rows(torch.ones(3, 2, 5), 10, columns=False).shape
        torch.Size([3, 10])
    """
    plain = type(weight.data) is Tensor and weight.layout is torch.strided and weight.dtype in _DTYPES
    if not plain or weight.dim() < 2:
        return None
    rows = as_rows(weight, columns=columns)
    return rows if rows.shape[1] == width else None
