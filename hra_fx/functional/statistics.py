"""Statistics of a chain of reflections: rotation angles, distance from the identity, orthogonality error, condition.

All are computed from `k x k` matrices; `Q: (d, d)` is never computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional.householder import compact_wy, normalize, working_dtype


class RotationStats(NamedTuple):
    """Compute how far `Q` is from the identity.

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
    one direction, which counts as an angle of pi. A plane has one angle, although it has two eigenvalues. Angles up to
    `min_angle` are rounding errors of vectors that cancel, and are omitted.

    Args:
        chain: `U: (d, k)`.

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
    block = principal_block(vectors, compact_wy(vectors))
    identity = torch.eye(block.shape[0], dtype=block.dtype)
    norms = (torch.linalg.matrix_norm(matrix) for matrix in (block - identity, block.mT @ block - identity))
    rotation, orthogonality = (float(norm) for norm in norms)
    # In descending order, each plane has two equal angles, after a single pi if one direction is reflected. So take
    # every second angle.
    angles = torch.linalg.eigvals(block).angle().abs().sort(descending=True).values[::2]
    return RotationStats(rotation, tuple(angles[angles > min_angle(chain)].tolist()), orthogonality)


def min_angle(chain: Tensor) -> float:
    """The largest angle that can be a rounding error, in radians: `8 k eps`, with the eps of the dtype of `T`.

    Example:
        >>> f"{min_angle(torch.ones(100, 8)):.0e}"
        '8e-06'
    """
    return 8 * chain.shape[1] * torch.finfo(working_dtype(chain.dtype)).eps


def principal_block(chain: Tensor, factor: Tensor) -> Tensor:
    """`Q` restricted to the span of its vectors; outside of it, `Q` is the identity.

    With `U = V R` (thin QR), `Q = I - V (R T R^T) V^T`, so the block is `I - R T R^T`. It has the orthogonality error
    of `Q`, and the eigenvalues of `Q` except those of the rest of the space.

    Args:
        chain: `U: (d, k)`.
        factor: `T: (k, k)`, in the precision to be measured.

    Returns:
        `(m, m)` with `m = min(d, k)`, float64, on the CPU.

    Example:
        >>> U = torch.tensor([[0.0], [2.0]])
        >>> principal_block(U, compact_wy(U))
        tensor([[-1.]], dtype=torch.float64)
    """
    vectors, inner = (matrix.detach().to("cpu", torch.float64) for matrix in (chain, factor))
    triangle: Tensor = torch.linalg.qr(vectors, mode="r").R
    return torch.eye(triangle.shape[0], dtype=triangle.dtype) - triangle @ inner @ triangle.mT


def inverse_condition(vectors: Tensor) -> float:
    """Measure the linear independence of the columns of `U: (d, r)`: `min |R_ii| / max |R_ii|` of `U = V R`, in [0, 1].

    For several matrices `(n, d, r)`, the smallest value. If the value is near the epsilon of the dtype of `U`, the
    Gram-Schmidt basis is rounding noise.

    Example:
        >>> inverse_condition(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        0.0
    """
    diagonal = torch.linalg.qr(vectors.detach().double(), mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    largest, smallest = diagonal.amax(dim=-1), diagonal.amin(dim=-1)
    return float(torch.where(largest > 0, smallest / largest, 0.0).min())
