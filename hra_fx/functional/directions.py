"""The main directions of many vectors, from a matrix with few rows that is updated with each batch.

After each batch, the matrix contains the largest right singular vectors, times their singular values, of its rows and
the new ones. This is incremental principal component analysis without centering (Ross et al. 2008,
https://doi.org/10.1007/s11263-007-0075-7).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

#: Rows of a sketch in addition to the number of directions.
_MORE = 8
#: Iterations of `torch.svd_lowrank`. With one, a slowly falling spectrum loses several percent of the energy.
_ITERATIONS = 2


class Sketch:
    """Collects vectors of length `d`, for one layer or for several experts, in float64 (float32 on MPS).

    Attributes:
        values: the rows, `(s, d)` or `(experts, s, d)`; NaN if a vector was not finite.
    """

    def __init__(self, d: int, directions: int, device: torch.device, experts: int | None = None) -> None:
        """Start without vectors."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = min(d, directions + _MORE)
        self.directions = directions
        self.values = torch.zeros(*(() if experts is None else (experts,)), size, d, dtype=dtype, device=device)

    def add(self, x: Tensor, expert: int | None = None) -> None:
        """Add the rows of `x: (n, d)`."""
        own = self.values if expert is None else self.values[expert]
        own.copy_(_main_rows(torch.cat([own, x.to(own.dtype)]), len(own)))

    @property
    def is_finite(self) -> bool:
        """Whether all vectors were finite."""
        return bool(self.values.isfinite().all())

    def basis(self, earlier: Tensor | None = None) -> Tensor:
        """The main directions, orthonormal columns `(..., d, k)`.

        The first ones are `earlier`, and the others are orthogonal to them. Columns are zero if the vectors span fewer
        directions.
        """
        earlier = self.values[..., :0, :].mT if earlier is None else earlier.to(self.values)
        _, lengths, rows = torch.linalg.svd(self.values - (self.values @ earlier) @ earlier.mT, full_matrices=False)
        longest = torch.linalg.matrix_norm(self.values, 2)[..., None]
        rounding = self.values.shape[-1] * torch.finfo(self.values.dtype).eps * longest
        found = torch.where((lengths > rounding).unsqueeze(-1), rows, 0.0).mT
        return torch.cat([earlier, found], dim=-1)[..., : self.directions]


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """A new sketch of the vectors of all sketches."""
    made = copy.copy(sketches[0])
    rows = torch.cat([sketch.values for sketch in sketches], dim=-2)
    made.values = _main_rows(rows, made.values.shape[-2]) if len(sketches) > 1 else rows
    return made


def _main_rows(rows: Tensor, size: int) -> Tensor:
    """The largest right singular vectors of `rows: (..., n, d)`, times their singular values: `(..., size, d)`."""
    if not rows.isfinite().all():  # a decomposition would raise an error
        return torch.full_like(rows[..., :size, :], torch.nan)
    _, lengths, directions = torch.svd_lowrank(rows, q=size, niter=_ITERATIONS)
    return (directions * lengths.unsqueeze(-2)).mT
