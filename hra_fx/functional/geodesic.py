r"""Fractional rotations: the path from the identity to a chain of reflections, for the scale of an adapter.

A chain `U: (d, k)` represents `Q = H_1 ... H_k` (see `hra_fx.functional.householder`). If its determinant is 1, `Q` is
a rotation, and the shortest path of rotations from `I` to `Q` is

    Q(alpha) = exp(alpha log Q),            Q(0) = I,   Q(1) = Q,   Q(a) Q(b) = Q(a + b)

A rotation rotates orthogonal planes. `Q(alpha)` rotates the same planes by `alpha` times their angles, and a rotation
of one plane is a product of two reflections. So the task is to find the planes. They lie in the span of the vectors,
`U = V R` (thin QR), where `Q` is the block `B = I - R T R^T` of size at most `(k, k)` (`householder.span`):

1. `(B + B^T) / 2` has the eigenvalues `cos(theta)`, twice for each plane. They are split at a gap into a front half,
   where `B` has no angle near pi, and a back half, where `-B` has none.
2. In each half the Cayley transform `C = (I + B)^-1 (I - B)` is skew-symmetric with the eigenvalues
   `-i tan(theta / 2)`, and `i C` is Hermitian: an eigenvector `x + i y` of a negative eigenvalue spans the plane of
   `x` and `y`.

Both steps only need a Hermitian eigenbasis, so equal angles, very small angles and angles of pi do not lose accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.functional.householder import normalize, span


def fractional_rotation(chain: Tensor, alpha: float) -> Tensor:
    """Compute a chain for `Q(alpha)`, the point at `alpha` on the path from `I` to `Q`; also for a batch of chains.

    It is computed in float64 on the CPU, without a gradient. If `Q` rotates planes by pi (as with
    Gram-Schmidt), the path is not unique, but the result is deterministic.

    A zero column of `U: (d, k)` gives the identity. `alpha` is from 0 (the identity) to 1 (`Q`).

    Returns:
        `(d, k)`, unit vectors in the dtype and on the device of `chain`: two for each rotated plane, and then pairs of
        equal vectors, which cancel. Zero columns are only left if all of `U` is zero, and one if `k` is odd.

    Raises:
        AdapterError: the chain is on the meta device, not finite, or has determinant -1.

    Example:
        >>> U = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # Q = -I, a half turn
        >>> half = fractional_rotation(U, 0.5)
        >>> from hra_fx.functional.householder import compact_wy
        >>> (torch.eye(2) - half @ compact_wy(half) @ half.T).abs().round(decimals=4)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if chain.dim() > 2:
        return torch.stack([fractional_rotation(one, alpha) for one in chain])
    with torch.no_grad():
        vectors = _unit_columns(chain)
        if not vectors.numel():
            return torch.zeros_like(chain)
        basis, moved = span(vectors)
        block = moved.new_ones(len(moved)).diag() - moved
        planes = _planes(block)
        angles = alpha * _angles(block, planes)
        # Smaller angles are rounding errors of vectors that cancel.
        rotated = angles.abs() > 8 * vectors.shape[1] * torch.finfo(vectors.dtype).eps
        first, second = planes[:, 0::2][:, rotated], planes[:, 1::2][:, rotated]
        halves = angles[rotated] / 2
        # Two reflections rotate by twice the angle between their vectors, from the right vector to the left vector.
        left = first * halves.cos() + second * halves.sin()
        part = basis @ torch.stack([left, first], dim=2).flatten(1)
        # Not any unit vectors: those of the chain are a start for training, and do not leave its span.
        spare = torch.arange(part.shape[1], chain.shape[1] // 2 * 2, 2, device="cpu") % vectors.shape[1]
        idle = vectors[:, spare].repeat_interleave(2, dim=1)
        padded = nn.functional.pad(torch.cat([part, idle], dim=1), (0, chain.shape[1] % 2))
        return padded.to(chain.dtype).to(chain.device)


def _unit_columns(chain: Tensor) -> Tensor:
    """The nonzero columns of `U: (d, k)` as `(d, n)` unit vectors, float64 on the CPU. Raises if `n` is odd."""
    if chain.is_meta:
        raise AdapterError("the vectors are on the meta device. Load the adapter's weights first.")
    # Two steps, because some devices (mps) do not support float64.
    vectors = chain.detach().to("cpu").to(torch.float64)
    if not bool(torch.isfinite(vectors).all()):
        raise AdapterError("the vectors have NaN or infinite values. Load or train the adapter again.")
    vectors = normalize(vectors[:, vectors.ne(0).any(dim=0)])
    if vectors.shape[1] % 2:
        raise AdapterError(
            "an odd number of reflections (determinant -1) has no path from the identity. Train with an even r."
        )
    return vectors


def _planes(block: Tensor) -> Tensor:
    """The planes of a rotation `B: (m, m)`: orthonormal columns `(m, 2 * (m // 2))`, two adjacent columns per plane."""
    cosines, vectors = torch.linalg.eigh((block + block.mT) / 2)
    angles = torch.acos(cosines.clamp(-1, 1))
    back = angles > _cut(angles)
    halves = [(vectors[:, ~back], 1), (vectors[:, back], -1)]
    # The back half has an even size: it has both vectors of each plane, and an even number of eigenvalues -1.
    return torch.cat([half @ _skew_planes(sign * half.mT @ block @ half) for half, sign in halves], dim=1)


def _cut(angles: Tensor) -> float:
    """The center of the largest gap between `angles: (m,)` from pi / 4 to 3 pi / 4."""
    ends = angles.new_tensor([math.pi / 4, 3 * math.pi / 4])
    marks = torch.cat([ends, angles[(angles > ends[0]) & (angles < ends[1])]]).sort().values
    gap = int(marks.diff().argmax())
    return float(marks[gap] + marks[gap + 1]) / 2


def _skew_planes(block: Tensor) -> Tensor:
    """`_planes` of a rotation `(n, n)` without an angle near pi."""
    identity = block.new_ones(len(block)).diag()
    cayley = torch.linalg.solve(identity + block, identity - block)
    vectors = torch.linalg.eigh(1j * (cayley - cayley.mT) / 2).eigenvectors
    negative = vectors[:, : block.shape[0] // 2]
    # An angle near 0 (in the back half, near pi) has an ill-conditioned eigenvector; its real and imaginary parts may
    # even be parallel. QR makes the planes orthonormal in the order of descending angles, so it only changes planes
    # with angles that are rounding errors.
    planes: Tensor = torch.linalg.qr(torch.view_as_real(negative).flatten(1)).Q
    return planes


def _angles(block: Tensor, planes: Tensor) -> Tensor:
    """The angles `(h,)` of `B: (m, m)` in `planes: (m, 2 h)`, from the first to the second vector of each plane."""
    first, second = planes[:, 0::2], planes[:, 1::2]
    image_first, image_second = block @ first, block @ second
    cosines = (first * image_first + second * image_second).sum(dim=0)
    sines = (second * image_first - first * image_second).sum(dim=0)
    return torch.atan2(sines, cosines)
