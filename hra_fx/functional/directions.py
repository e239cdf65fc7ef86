r"""The main directions of many vectors `x`, from a sketch that is much smaller than `C = \sum x x^T`.

With a random matrix `Omega: (d, s)`, the sketch is `Y = C Omega`. For `s` a little larger than the number of
directions, the Nystrom approximation `Y (Omega^T Y)^-1 Y^T` has nearly the main eigenvectors of `C` (Tropp et al. 2017,
https://arxiv.org/abs/1706.05736, algorithm 3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

#: Columns of a sketch in addition to the number of directions.
_MORE = 8
_SEED = 20240517


class Sketch:
    """Collects vectors of length `d`, for one layer or for several experts, in float64 (float32 on MPS).

    Attributes:
        values: `Y`, `(d, s)` or `(experts, d, s)`.
    """

    def __init__(self, d: int, directions: int, device: torch.device, experts: int | None = None) -> None:
        """Start without vectors."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = min(d, directions + _MORE)
        generator = torch.Generator().manual_seed(_SEED)  # the same in every process
        self.directions = directions
        self.test = torch.randn(d, size, generator=generator, dtype=torch.float64).to(device, dtype)
        self.values = torch.zeros(*(() if experts is None else (experts,)), d, size, dtype=dtype, device=device)

    def add(self, x: Tensor, expert: int | None = None) -> None:
        """Add the rows of `x: (n, d)`."""
        rows = x.to(self.values.dtype)
        own = self.values if expert is None else self.values[expert]
        own.addmm_(rows.mT, rows @ self.test)

    @property
    def is_finite(self) -> bool:
        """Whether all vectors were finite."""
        return bool(self.values.isfinite().all())

    def basis(self, earlier: Tensor | None = None) -> Tensor:
        """The main directions, orthonormal columns `(..., d, k)`.

        The first ones are `earlier`, and the others are orthogonal to them. Columns are zero if the vectors span fewer
        directions.
        """
        scale = self.values.abs().amax(dim=(-2, -1), keepdim=True)
        values = self.values / torch.where(scale > 0, scale, 1.0)
        inner = self.test.mT @ values
        sizes, turns = torch.linalg.eigh((inner + inner.mT) / 2)
        least = sizes.shape[-1] * torch.finfo(values.dtype).eps * sizes[..., -1:].clamp(min=0.0)
        root = torch.where(sizes > least, sizes, torch.inf).rsqrt()
        earlier = values[..., :0] if earlier is None else earlier.to(values)
        factor = values @ (turns * root.unsqueeze(-2))
        vectors, lengths, _ = torch.linalg.svd(factor - earlier @ (earlier.mT @ factor), full_matrices=False)
        is_known = lengths.square() > 4 * least  # smaller ones are rounding errors
        return torch.cat([earlier, torch.where(is_known.unsqueeze(-2), vectors, 0.0)], -1)[..., : self.directions]


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """A new sketch of the vectors of all sketches."""
    made = copy.copy(sketches[0])
    made.values = torch.stack([sketch.values for sketch in sketches]).sum(0)
    return made
