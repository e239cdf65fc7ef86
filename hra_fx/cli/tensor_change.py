"""Compare two tensors, and find out whether one is the other rotated.

A rotation `W -> W Q` preserves the norm of every row of `W: (out, d)`, unlike almost any other change. Stored values
are rounded, so norms differ slightly: by `sum w_i^2 e_i / |w|^2` for relative errors `e_i` of at most half an epsilon.
For independent errors, the standard deviation is `eps / 2 / sqrt(3) * sqrt(sum w_i^4) / |w|^2`. Eight of these are
allowed, far less than the worst case, within which a small change of another kind would be missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["equal", "rounding", "small", "rotated", "rotated (columns)", "changed", "not finite"]

# Number of values that are cast at a time.
_CHUNK = 1 << 20
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)
_DEVIATIONS = 8.0


@dataclass(frozen=True)
class Change:
    """The change from a tensor `A` to a tensor `B` of the same shape.

    Attributes:
        how: "rotated" if all row norms are preserved, "rotated (columns)" if all column norms are, as for a weight
            stored as `(in, out)`; "rounding" up to an epsilon of the dtype; "small" if norms are preserved, but the
            change is too small to tell it from a rotation.
        relative: `|B - A|_F / |A|_F`.
        largest: largest absolute change of an element.
        lengths: largest relative change of a row norm, or of a column norm if these are preserved; NaN for a tensor
            without rows.
    """

    how: How
    relative: float
    largest: float
    lengths: float


def change_of(a: Tensor, b: Tensor) -> Change:
    """Compare two CPU tensors of the same shape, in blocks of rows.

    Example:
        >>> change_of(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]])).how
        'rotated'
    """
    one, other = _matrix(a), _matrix(b)
    sums = _Sums(one.shape[1])
    step = max(1, _CHUNK // max(1, one.shape[1]))
    for before, after in zip(torch.split(one, step), torch.split(other, step), strict=True):
        if before.numel():
            sums.add(before.double(), after.double())
    if not math.isfinite(sums.difference):
        return Change("equal" if sums.same else "not finite", math.nan, math.nan, math.nan)
    relative = math.sqrt(sums.difference / sums.whole) if sums.whole else (math.inf if sums.difference else 0.0)
    eps = max((torch.finfo(tensor.dtype).eps for tensor in (a, b) if tensor.is_floating_point()), default=0.0)
    if a.dim() < 2:
        return Change(_sort(relative, eps), relative, sums.largest, math.nan)
    rows, columns = sums.rows(eps), sums.columns(eps)
    how = _sort(relative, eps)
    if how == "changed" and rows.kept:
        how = "rotated" if relative > rows.least else "small"
    elif how == "changed" and columns.kept and relative > columns.least:
        return Change("rotated (columns)", relative, sums.largest, columns.change)
    return Change(how, relative, sums.largest, rows.change)


def _sort(relative: float, eps: float) -> How:
    return "equal" if not relative else "rounding" if relative <= eps else "changed"


class _Lengths(NamedTuple):
    """Changes of row or column norms.

    Attributes:
        change: largest relative change.
        kept: whether rounding explains all changes.
        least: smallest relative change of the tensor for which the norms can rule out a rotation.
    """

    change: float
    kept: bool
    least: float


def _lengths(squares: Tensor, width: int, eps: float) -> _Lengths:
    """From squared norms before and after, and sums of fourth powers before: `(3, n)`."""
    before, after = squares[:2].sqrt()
    there = before > 0
    change = ((after - before).abs() / before)[there]
    spread = eps / 2 / math.sqrt(3) * (squares[2].sqrt() / squares[0])[there]
    # Plus the rounding of products in float32 (or float64, for wider dtypes).
    slack = (_DEVIATIONS * spread).clamp(max=eps) + 16 * min(eps, torch.finfo(torch.float32).eps)
    if not len(change):
        return _Lengths(0.0, not bool(after.any()), 0.0)
    kept = bool((change <= slack).all()) and not bool(after[~there].any())
    # A random change is nearly orthogonal to a row, more so the longer the row is.
    return _Lengths(float(change.max()), kept, float(slack.max()) * math.sqrt(width))


class _Sums:
    """Sums over the blocks of two tensors."""

    def __init__(self, width: int) -> None:
        self.difference = self.whole = self.largest = 0.0
        self.same = True
        self._rows: list[Tensor] = []
        self._columns = torch.zeros(3, width, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a block, `(rows, width)`."""
        self.same = self.same and bool(((a == b) | (a.isnan() & b.isnan())).all())
        difference = b - a
        self.difference += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        powers = torch.stack([a.square(), b.square(), a.square().square()])
        self.whole += float(powers[0].sum())
        self._rows.append(powers.sum(dim=2))
        self._columns += powers.sum(dim=1)

    def rows(self, eps: float) -> _Lengths:
        """Changes of the row norms."""
        return _lengths(torch.cat([self._columns[:, :0], *self._rows], dim=1), self._columns.shape[1], eps)

    def columns(self, eps: float) -> _Lengths:
        """Changes of the column norms."""
        return _lengths(self._columns, sum(block.shape[1] for block in self._rows), eps)


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix; complex values become pairs, packed values become bytes."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype is _PACKED:
        tensor = tensor.view(torch.uint8)
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
