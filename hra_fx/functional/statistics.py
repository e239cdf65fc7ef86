r"""Statistics of a chain of reflections: how far it rotates, and how much it changes a weight.

All are computed from `k x k` matrices (`householder.span`); `Q: (d, d)` is never computed.

`Q` rotates some directions and does not change their orthogonal complement. Let `P` be the projector on the rotated
directions. A row `w` of the weight is `w P + w (I - P)`, and `Q` only changes the first part. `|W P|_F^2 / |W|_F^2` is
the share of this part in the whole weight. It limits how much the adapter can change the layer, for any angles.

With `I - Q = V M V^T`, `M` is normal with singular values `2 sin(angle / 2)`, so the left singular vectors `G` of the
nonzero ones span the rotated directions: `P = V G G^T V^T`, and `|W P|_F = |W V G|_F` takes one skinny product. The
change of the weight follows from the same product: `|W Q - W|_F = |W V M|_F`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional.householder import normalize, span, working_dtype
from hra_fx.functional.low_rank import project

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RotationStats(NamedTuple):
    """How far `Q` is from the identity.

    Attributes:
        rotation: `|Q - I|_F`.
        angles: the rotation angle of each plane, in radians from 0 to pi, in descending order; see `rotation_stats`.
        orthogonality: `|Q^T Q - I|_F`, with `T` in the precision of the chain.
    """

    rotation: float
    angles: tuple[float, ...]
    orthogonality: float

    @property
    def angle(self) -> float:
        """The largest angle, in radians; 0 for the identity, pi for a reflection."""
        return self.angles[0] if self.angles else 0.0

    @property
    def mean_angle(self) -> float:
        """The mean of the angles, in radians; 0 for the identity."""
        return sum(self.angles) / len(self.angles) if self.angles else 0.0


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
        return RotationStats(0.0, (), 0.0)
    vectors = normalize(chain.detach())
    if vectors.is_meta or not bool(torch.isfinite(vectors).all()):
        return RotationStats(math.nan, (math.nan,), math.nan)
    _, moved = span(vectors)
    identity = torch.eye(moved.shape[0], dtype=moved.dtype)
    block = identity - moved
    rotation, orthogonality = (float(torch.linalg.matrix_norm(part)) for part in (moved, block.mT @ block - identity))
    # In descending order, each plane has two equal angles, after a single pi if one direction is reflected. So take
    # every second angle.
    angles = torch.linalg.eigvals(block).angle().abs().sort(descending=True).values[::2]
    return RotationStats(rotation, tuple(angles[angles > min_angle(chain)].tolist()), orthogonality)


def min_angle(chain: Tensor) -> float:
    """The largest angle that can be a rounding error, in radians: `8 k eps`, with the eps of the dtype of `T`."""
    return 8 * chain.shape[1] * torch.finfo(working_dtype(chain.dtype)).eps


class RelativeChange(NamedTuple):
    """How much a chain changes a weight `W: (out, d)`.

    Attributes:
        share: `|W P|_F^2 / |W|_F^2`, the share of the weight in the rotated directions, from 0 to 1.
        change: `|W Q - W|_F / |W|_F`, from 0 to 2.
    """

    share: float
    change: float


def relative_change(rows: Tensor, chain: Tensor) -> RelativeChange:
    """Compute how much a chain `U: (d, k)` changes a weight `rows: (out, d)`.

    The result is 0 for a weight of zeros, and NaN if the weight or the chain has no data or is not finite.

    Example:
        >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        RelativeChange(share=0.36, change=1.2)
    """
    if rows.is_meta or chain.is_meta or not bool(torch.isfinite(chain).all()):
        return RelativeChange(math.nan, math.nan)
    if not chain.shape[1]:
        return RelativeChange(0.0, 0.0)
    basis, moved = span(normalize(chain.detach()))
    left, sizes, _ = torch.linalg.svd(moved)
    inside = project(rows.detach(), basis)
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    whole = float(torch.linalg.vector_norm(rows.detach(), dtype=wide))
    if not whole:
        return RelativeChange(0.0, 0.0)
    rotated = float((inside @ left[:, sizes > min_angle(chain)]).norm())
    # Rounding can make the share slightly more than 1.
    return RelativeChange(min((rotated / whole) ** 2, 1.0), float((inside @ moved).norm()) / whole)


def readable_rows(weight: Tensor, width: int, *, fan_in_fan_out: bool) -> Tensor | None:
    """View a weight as the matrix `(out, d)` without a copy; `None` if it is quantized, packed, sharded or sparse."""
    plain = type(weight.data) is Tensor and weight.layout is torch.strided and weight.dtype in _DTYPES
    if not plain or weight.dim() < 2:
        return None
    rows = weight.mT if fan_in_fan_out else weight.flatten(1)
    return rows if rows.shape[1] == width else None
