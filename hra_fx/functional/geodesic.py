r"""Part of the way from the identity to a chain of reflections: the mathematics of an adapter's strength.

A chain `U: (d, k)` stands for `Q = H_1 ... H_k` (see `hra_fx.functional.householder`). With determinant 1 it is a rotation, and
the shortest path inside the rotations that leads to it is

    Q(alpha) = exp(alpha log Q),            Q(0) = I,   Q(1) = Q,   Q(a) Q(b) = Q(a + b)

Every rotation turns planes that are orthogonal to each other: `Q(alpha)` turns the same planes by `alpha` times their
angles, and each is again two reflections. So all that is looked for is planes. They lie in the span of the vectors,
`U = V R` (thin QR), where `Q` is the block `B = I - R T R^T`, never larger than `(k, k)`:

1. `(B + B^T) / 2` has the eigenvalues `cos(theta)`, each plane's twice. They are cut in two at a gap, which gives
   `B` on a front half and `-B` on a back half, both without an angle near pi.
2. There the Cayley transform `C = (I + B)^-1 (I - B)` is skew with the eigenvalues `-i tan(theta / 2)`, and `i C` is
   Hermitian: an eigenvector `x + i y` of a negative eigenvalue has the plane of `x` and `y`.

Both steps ask for a Hermitian eigenbasis only, so that equal angles, tiny ones and half turns cost no accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.householder import compact_wy, normalize, rotate


def fraction(chain: Tensor, alpha: float) -> Tensor:
    """A chain whose product is `Q(alpha)`, the point at `alpha` on the way from `I` to `Q`.

    Computed in float64 on the CPU, as a constant without gradient. Where `Q` turns planes by pi the way is not unique
    (Gram-Schmidt without an anchor is such a `Q`): the same chain always gets the same one.

    Args:
        chain: `U: (d, k)`; a zero column is the identity.
        alpha: from 0 (the identity) to 1 (`Q`).

    Returns:
        `(d, m)` of unit vectors in the dtype and on the device of `chain`, with an even `m <= min(d, k)`: two for each
        plane that turns, so `(d, 0)` for the identity.

    Raises:
        AdapterError: `alpha` is out of range, or the chain is not finite, without data, or of determinant -1.

    Example:
        >>> U = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # Q = -I, a half turn
        >>> half = fraction(U, 0.5)
        >>> (torch.eye(2) - half @ compact_wy(half) @ half.T).abs().round(decimals=4)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if not 0 <= alpha <= 1:
        raise AdapterError(f"alpha {alpha!r} is not from 0 to 1. Pass 0 for the base model, 1 for all of the adapter.")
    with torch.no_grad():
        vectors = _unit_columns(chain)
        basis, triangle = torch.linalg.qr(vectors)
        block = rotate(_identity(triangle.shape[0]), triangle, compact_wy(triangle))
        planes = _planes(block)
        angles = alpha * _angles(block, planes)
        # What turns by less is rounding, as vectors that cancel each other leave it.
        turning = angles.abs() > 8 * vectors.shape[1] * torch.finfo(vectors.dtype).eps
        first, second = planes[:, 0::2][:, turning], planes[:, 1::2][:, turning]
        halves = angles[turning] / 2
        # Two reflections turn by twice the angle between their vectors, from the right one to the left one.
        left = first * halves.cos() + second * halves.sin()
        part: Tensor = basis @ torch.stack([left, first], dim=2).flatten(1)
        return part.to(chain.dtype).to(chain.device)


def _unit_columns(chain: Tensor) -> Tensor:
    """The columns of `U: (d, k)` that reflect, `(d, n)` of length one, float64 on the CPU; refused if `n` is odd."""
    if chain.is_meta:
        raise AdapterError("vectors without data (on the meta device). Load the adapter's weights first.")
    # In two steps, for a device such as mps has no float64 to cast to.
    vectors = chain.detach().to("cpu").to(torch.float64)
    if not bool(torch.isfinite(vectors).all()):
        raise AdapterError("vectors that are not finite (NaN or infinity). Load or train the adapter again.")
    vectors = normalize(vectors[:, vectors.ne(0).any(dim=0)])
    if vectors.shape[1] % 2:
        raise AdapterError(
            "an odd number of reflections (determinant -1) has no path from the identity. Train with hra_fx's "
            "init_weights=True, which anchors such adapters, or with an even r and without Gram-Schmidt."
        )
    return vectors


def _planes(block: Tensor) -> Tensor:
    """The planes of a rotation `B: (m, m)`: orthonormal columns `(m, 2 * (m // 2))`, two after each other for each."""
    cosines, vectors = torch.linalg.eigh((block + block.mT) / 2)
    angles = torch.acos(cosines.clamp(-1, 1))
    back = angles > _cut(angles)
    halves = [(vectors[:, ~back], 1), (vectors[:, back], -1)]
    # The back half is even: it holds both vectors of a plane, and -1 an even number of times.
    return torch.cat([half @ _skew_planes(sign * half.mT @ block @ half) for half, sign in halves], dim=1)


def _cut(angles: Tensor) -> float:
    """The middle of the largest gap that `angles: (m,)` leave between pi / 4 and 3 pi / 4."""
    ends = angles.new_tensor([math.pi / 4, 3 * math.pi / 4])
    marks = torch.cat([ends, angles[(angles > ends[0]) & (angles < ends[1])]]).sort().values
    gap = int(marks.diff().argmax())
    return float(marks[gap] + marks[gap + 1]) / 2


def _skew_planes(block: Tensor) -> Tensor:
    """The planes of a rotation `(n, n)` without an angle near pi: `(n, 2 * (n // 2))`, as `_planes` gives them."""
    identity = _identity(block.shape[0])
    cayley = torch.linalg.solve(identity + block, identity - block)
    vectors = torch.linalg.eigh(1j * (cayley - cayley.mT) / 2).eigenvectors
    negative = vectors[:, : block.shape[0] // 2]
    # An angle near 0 (in the back half, near pi) has an ill-determined eigenvector, whose two parts may even be
    # parallel. QR makes planes of them all the same, in the order of falling angles, so that what it moves is always
    # turned by no more than rounding.
    planes: Tensor = torch.linalg.qr(torch.view_as_real(negative).flatten(1)).Q
    return planes


def _angles(block: Tensor, planes: Tensor) -> Tensor:
    """By which `B: (m, m)` turns each of `planes: (m, 2 h)`, from its first vector to its second: `(h,)`."""
    first, second = planes[:, 0::2], planes[:, 1::2]
    turned_first, turned_second = block @ first, block @ second
    cosines = (first * turned_first + second * turned_second).sum(dim=0)
    sines = (second * turned_first - first * turned_second).sum(dim=0)
    return torch.atan2(sines, cosines)


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device="cpu")
