r"""Statistics of a chain of reflections: how far it rotates, and how much it changes a weight.

All are computed from `k x k` matrices (`householder.span`); `Q: (d, d)` is never computed.

With `I - Q = V M V^T`, the change of a weight takes one skinny product: `|W Q - W|_F = |W V M|_F`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional.householder import normalize, span, working_dtype
from hra_fx.functional.low_rank import project
from hra_fx.functional.rotate import widest_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RotationStats(NamedTuple):
    """How far `Q` rotates.

    Attributes:
        angles: the rotation angle of each plane, in radians from 0 to pi, in descending order; see `rotation_stats`.
        orthogonality: `|Q^T Q - I|_F`, with `T` in the precision of the chain.
    """

    angles: tuple[float, ...]
    orthogonality: float


def rotation_stats(chain: Tensor) -> RotationStats:
    """Compute rotation angles and norms of a chain; NaN for a chain on the meta device or with non-finite values.

    `Q` rotates orthogonal planes and does not change the rest of the space. If its determinant is -1, it also reflects
    one direction, which counts as an angle of pi. A plane has one angle, although it has two eigenvalues. Very small
    angles are rounding errors of vectors that cancel, and are omitted.

    Example:
        >>> U = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # a rotation and a reflection
        >>> [round(math.degrees(angle)) for angle in rotation_stats(U).angles]
        [180, 90]
    """
    if not chain.shape[1]:
        return RotationStats((), 0.0)
    vectors = normalize(chain.detach())
    if vectors.is_meta or not bool(torch.isfinite(vectors).all()):
        return RotationStats((math.nan,), math.nan)
    _, moved = span(vectors)
    identity = torch.eye(moved.shape[0], dtype=moved.dtype)
    block = identity - moved
    orthogonality = float(torch.linalg.matrix_norm(block.mT @ block - identity))
    # In descending order, each plane has two equal angles, after a single pi if one direction is reflected. So take
    # every second angle.
    # Less than `8 k eps` can be a rounding error.
    smallest = 8 * chain.shape[1] * torch.finfo(working_dtype(chain.dtype)).eps
    angles = torch.linalg.eigvals(block).angle().abs().sort(descending=True).values[::2]
    return RotationStats(tuple(angles[angles > smallest].tolist()), orthogonality)


def relative_change(rows: Tensor, chain: Tensor) -> float:
    """How much a chain `U: (d, k)` changes a weight `rows: (out, d)`: `|W Q - W|_F / |W|_F`, from 0 to 2.

    The result is 0 for a weight of zeros, and NaN if the weight or the chain is not finite.

    Example:
        >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        1.2
    """
    if not bool(torch.isfinite(chain).all()):
        return math.nan
    if not chain.shape[1]:
        return 0.0
    basis, moved = span(normalize(chain.detach()))
    wide = widest_dtype(rows.device)
    whole = float(torch.linalg.vector_norm(rows.detach(), dtype=wide))
    return float((project(rows.detach(), basis) @ moved).norm()) / whole if whole else 0.0


def readable_rows(weight: Tensor, width: int, *, fan_in_fan_out: bool) -> Tensor | None:
    """View a weight as the matrix `(out, d)` without a copy; `None` if it is quantized, packed, sharded or sparse."""
    plain = type(weight.data) is Tensor and weight.layout is torch.strided and weight.dtype in _DTYPES
    if not plain or weight.dim() < 2:
        return None
    rows = weight.mT if fan_in_fan_out else weight.flatten(1)
    return rows if rows.shape[1] == width else None
