r"""The effect of a chain of reflections on a weight: the share that it rotates, and the relative change.

`Q` rotates some directions and does not change their orthogonal complement. Let `P` be the projector on the rotated
directions. A row `w` of the weight is `w P + w (I - P)`, and `Q` only changes the first part. `|W P|_F^2 / |W|_F^2` is
the share of this part in the whole weight. It limits how much the adapter can change the layer, for any angles.

The rotated directions lie in the span of the vectors, `U = V R` (thin QR), where `Q` is the block `B = I - R T R^T`.
`I - B` is normal with singular values `2 sin(angle / 2)`, so the left singular vectors `G` of the nonzero ones span the
rotated directions: `P = V G G^T V^T`, and `|W P|_F = |W V G|_F` takes one skinny product. The change of the weight
follows from the same product, because `W (Q - I) = -W V (I - B) V^T`, and so `|W Q - W|_F = |(W V G) (G^T (I - B))|_F`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional.householder import compact_wy, normalize, working_dtype
from hra_fx.functional.statistics import min_angle

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The number of elements of a weight that are cast at a time.
_CHUNK = 1 << 22


class RelativeChange(NamedTuple):
    """Compute how much a chain changes a weight `W: (out, d)`.

    Attributes:
        share: `|W P|_F^2 / |W|_F^2`, the share of the weight in the rotated directions, from 0 to 1.
        change: `|W Q - W|_F / |W|_F`, from 0 to 2.
    """

    share: float
    change: float


def rotated_directions(chain: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the directions that a chain of reflections rotates or reflects, and its effect on them.

    Args:
        chain: `U: (d, k)`, finite and with data.

    Returns:
        `D: (d, n)` with `n <= min(d, k)`: two columns for each plane, and one for a reflected direction; and
        `M: (n, m)` with `|W Q - W|_F = |W D M|_F`. Both are float64, on the CPU.

    Example:
        >>> directions, _ = rotated_directions(torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0]]))
        >>> directions.abs().round(decimals=6)
        tensor([[0.],
                [1.]], dtype=torch.float64)
    """
    vectors = normalize(chain.detach())
    factor = compact_wy(vectors).to("cpu", torch.float64)
    basis, triangle = torch.linalg.qr(vectors.to("cpu", torch.float64))
    moved = triangle @ factor @ triangle.mT
    left, sizes, _ = torch.linalg.svd(moved)
    left = left[:, sizes > min_angle(chain)]
    return basis @ left, left.mT @ moved


def relative_change(rows: Tensor, chain: Tensor) -> RelativeChange:
    """Compute how much a chain of reflections changes a weight.

    This does not create a `d x d` matrix, and casts the weight in pieces, to at least float32.

    Args:
        rows: `W: (out, d)`, floating point.
        chain: `U: (d, k)`.

    Returns:
        The share and the change; 0 for a weight of zeros, NaN if the weight or the chain has no data or is not finite.

    Example:
        >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        RelativeChange(share=0.36, change=1.2)
    """
    if rows.is_meta or chain.is_meta or not bool(torch.isfinite(chain).all()):
        return RelativeChange(math.nan, math.nan)
    if not chain.shape[1]:
        return RelativeChange(0.0, 0.0)
    directions, moved = (part.to(rows.device, working_dtype(rows.dtype)) for part in rotated_directions(chain))
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    part, change, whole = (torch.zeros((), dtype=wide, device=rows.device) for _ in range(3))
    for piece in torch.split(rows.detach(), max(1, _CHUNK // max(1, rows.shape[1]))):
        cast = piece.to(directions.dtype)
        inside = cast @ directions
        for total, matrix in ((part, inside), (change, inside @ moved), (whole, cast)):
            # Sum each row separately: a single float32 sum over millions of elements has only three correct digits.
            total += torch.linalg.vector_norm(matrix, dim=1).to(wide).square().sum()
    size = float(whole)
    if not size:
        return RelativeChange(0.0, 0.0)
    # Rounding can make the share slightly more than 1.
    return RelativeChange(min(float(part) / size, 1.0), math.sqrt(float(change) / size))


def readable_rows(weight: Tensor, width: int, *, fan_in_fan_out: bool) -> Tensor | None:
    """View a weight as the matrix `(out, d)` without a copy; `None` if it is quantized, packed, sharded or sparse.

    Args:
        weight: a layer's weight.
        width: `d`.
        fan_in_fan_out: whether the weight is stored as `(d, out)`.

    Example:
        >>> readable_rows(torch.ones(3, 2, 5), 10, fan_in_fan_out=False).shape
        torch.Size([3, 10])
    """
    plain = type(weight.data) is Tensor and weight.layout is torch.strided and weight.dtype in _DTYPES
    if not plain or weight.dim() < 2:
        return None
    rows = weight.mT if fan_in_fan_out else weight.flatten(1)
    return rows if rows.shape[1] == width else None
