"""The main directions of many vectors, from a matrix with few rows that is updated with each batch.

After each batch, the matrix contains the largest right singular vectors, times their singular values, of its rows and
the new ones. This is incremental principal component analysis without centering (Ross et al. 2008,
https://doi.org/10.1007/s11263-007-0075-7).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hra_fx.functional.rotate import widest_dtype

#: Rows of a sketch in addition to the number of directions.
_MORE = 8
#: Iterations of a decomposition. With two, a slowly falling spectrum loses several percent of the energy.
_ITERATIONS = 3
_SEED = 20240517


class Sketch:
    """Collects vectors of length `d`, for one layer or for several experts, in float64 (float32 on MPS).

    Attributes:
        values: the rows, `(s, d)` or `(experts, s, d)`; NaN if a vector was not finite.
        energy: the sum of the squares of all entries of all vectors.
    """

    def __init__(self, d: int, directions: int, device: torch.device, experts: int | None = None) -> None:
        """Start without vectors."""
        dtype = widest_dtype(device)
        size = min(d, directions + _MORE)
        self.values = torch.zeros(*(() if experts is None else (experts,)), size, d, dtype=dtype, device=device)
        self.energy = torch.zeros((), dtype=dtype, device=device)

    def add(self, x: Tensor, expert: int | None = None) -> None:
        """Add the rows of `x: (n, d)`."""
        own = self.values if expert is None else self.values[expert]
        wide = x.to(own.dtype)
        self.energy += wide.square().sum()
        own.copy_(_main_rows(torch.cat([own, wide]), len(own)))

    def merge(self, values: Tensor, energy: Tensor) -> None:
        """Replace the sketch by several ones, `values: (n, ..., s, d)` and `energy: (n,)`, as one."""
        self.values = _main_rows(torch.cat(list(values), dim=-2), values.shape[-2])
        self.energy = energy.sum()

    def basis(self, directions: int, earlier: Tensor | None = None) -> Tensor:
        """The `earlier` directions, and main directions that are orthogonal to them: orthonormal columns `(..., d, k)`.

        Columns are zero if the vectors span fewer directions.
        """
        known = self.values[..., :0, :].mT if earlier is None else earlier.to(self.values)
        _, lengths, rows = torch.linalg.svd(_rest(self.values, known), full_matrices=False)
        # What is left of vectors in the span of `earlier` is as large as the rounding of `earlier`.
        least = self.values.shape[-1] * torch.finfo(self.values.dtype).eps
        if earlier is not None:
            least = max(least, 8 * torch.finfo(earlier.dtype).eps)
        is_new = lengths > least * torch.linalg.matrix_norm(self.values, 2)[..., None]
        found = torch.where(is_new.unsqueeze(-1), _rest(rows, known), 0.0)[..., :directions, :]
        return torch.cat([known, torch.nn.functional.normalize(found, dim=-1).mT], dim=-1)

    def share(self, basis: Tensor) -> float:
        """The part of the energy in the span of orthonormal columns `(..., d, k)`, or a little less."""
        return min(float((self.values @ basis.to(self.values)).square().sum() / self.energy), 1.0)


def _rest(rows: Tensor, known: Tensor) -> Tensor:
    """Rows without their parts along some directions `(..., d, k)`."""
    return rows - (rows @ known) @ known.mT


def _main_rows(rows: Tensor, size: int) -> Tensor:
    """The largest right singular vectors of `rows: (..., n, d)`, times their singular values: `(..., size, d)`.

    A randomized decomposition (Halko et al. 2011, algorithm 4.4), with the same random numbers in every process.
    """
    if not rows.isfinite().all():  # a decomposition would raise an error
        return torch.full_like(rows[..., :size, :], torch.nan)
    generator = torch.Generator().manual_seed(_SEED)
    basis: Tensor = torch.randn(rows.shape[-1], size, generator=generator, dtype=torch.float64).to(rows)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    _, lengths, turns = torch.linalg.svd(rows @ basis, full_matrices=False)
    found: Tensor = lengths.unsqueeze(-1) * (turns @ basis.mT)
    return found
