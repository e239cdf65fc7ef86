r"""How far one tensor is from another, and whether it is the same one turned.

A rotation `W -> W Q` keeps the length of every row of `W: (out, d)`, and hardly any other change does. A file holds
rounded numbers, so that lengths differ a little all the same: by `sum w_i^2 e_i / |w|^2` for relative errors `e_i` of
at most half an epsilon each. Taken as independent, these have the standard deviation
`eps / 2 / sqrt(3) * sqrt(sum w_i^4) / |w|^2`, of which eight are allowed: far less than their worst case, which a small
change of another kind would hide behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

How = Literal["equal", "rounding", "turned", "turned (columns)", "changed", "not finite"]

# How many numbers are cast at a time.
_CHUNK = 1 << 20
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)
_DEVIATIONS = 8.0


@dataclass(frozen=True)
class Change:
    """From a tensor `A` to another one `B` of its shape.

    Attributes:
        how: in a word; "turned" where all rows keep their lengths, "turned (columns)" where all columns do, as in a
            weight that is stored as `(in, out)`, "rounding" for no more than an epsilon of the dtype.
        relative: `|B - A|_F / |A|_F`.
        largest: the largest `|B - A|` of an element.
        lengths: the largest relative change of the length of a row, or of a column where these keep theirs; NaN for a
            tensor without rows.
    """

    how: How
    relative: float
    largest: float
    lengths: float


def change_of(a: Tensor, b: Tensor) -> Change:
    """Compare two tensors of one shape, on the CPU; blocks of rows are cast, never all of it.

    Example:
        >>> change_of(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]])).how
        'turned'
    """
    sums = _Sums(a.shape[1:].numel() if a.dim() > 1 else 1)
    for one, other in _blocks(a, b):
        sums.add(one, other)
    eps = _epsilon(a, b)
    change = math.sqrt(sums.difference)
    relative = change / math.sqrt(sums.whole) if sums.whole else (math.inf if change else 0.0)
    if not math.isfinite(sums.difference):
        return Change("equal" if sums.same else "not finite", math.nan, math.nan, math.nan)
    if not change:
        return Change("equal", 0.0, 0.0, 0.0 if a.dim() > 1 else math.nan)
    rows, kept = sums.rows.judged(eps) if a.dim() > 1 else (math.nan, False)
    columns, turned = sums.columns.judged(eps) if a.dim() > 1 else (math.nan, False)
    if relative <= eps:
        return Change("rounding", relative, sums.largest, rows)
    if kept:
        return Change("turned", relative, sums.largest, rows)
    if turned:
        return Change("turned (columns)", relative, sums.largest, columns)
    return Change("changed", relative, sums.largest, rows)


class _Lengths:
    """Squares of lengths before and after, and sums of fourth powers, of rows or of columns."""

    def __init__(self, before: Tensor, after: Tensor, fourth: Tensor) -> None:
        self.before, self.after, self.fourth = before, after, fourth

    def judged(self, eps: float) -> tuple[float, bool]:
        """The largest relative change of a length, and whether rounding explains all."""
        before, after = self.before.sqrt(), self.after.sqrt()
        there = before > 0
        change = ((after - before).abs() / before)[there]
        spread = eps / 2 / math.sqrt(3) * (self.fourth.sqrt() / self.before)[there]
        # Besides, what products in float32 (or in float64, for wider numbers) round.
        slack = (_DEVIATIONS * spread).clamp(max=eps) + 64 * min(eps, torch.finfo(torch.float32).eps)
        kept = bool((change <= slack).all()) and not bool(after[~there].any())
        return float(change.max()) if len(change) else 0.0, kept


class _Sums:
    """What is summed up over the blocks of two tensors."""

    def __init__(self, width: int) -> None:
        self.difference = self.whole = self.largest = 0.0
        self.same = True
        self._rows: list[Tensor] = []
        self._columns = torch.zeros(3, width, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in a block, `(rows, width)`."""
        self.same = self.same and bool(((a == b) | (a.isnan() & b.isnan())).all())
        difference = b - a
        self.difference += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        powers = torch.stack([a.square(), b.square(), a.square().square()])
        self.whole += float(powers[0].sum())
        self._rows.append(powers.sum(dim=2))
        self._columns += powers.sum(dim=1)

    @property
    def rows(self) -> _Lengths:
        """Of the rows."""
        return _Lengths(*torch.cat(self._rows, dim=1))

    @property
    def columns(self) -> _Lengths:
        """Of the columns."""
        return _Lengths(*self._columns)


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows, in float64; a vector is a column."""
    pair = [_numbers(tensor).reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (a, b)]
    step = max(1, _CHUNK // max(1, pair[0].shape[1]))
    for one, other in zip(*(torch.split(matrix, step) for matrix in pair), strict=True):
        if one.numel():
            yield one.double(), other.double()


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor that can be cast: complex numbers as pairs, and two numbers in a byte as that byte."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    packed = tensor.is_floating_point() and tensor.dtype is _PACKED
    return tensor.view(torch.uint8) if packed else tensor


def _epsilon(a: Tensor, b: Tensor) -> float:
    """That of the coarser dtype; 0 where none rounds."""
    return max((torch.finfo(t.dtype).eps for t in (a, b) if t.is_floating_point()), default=0.0)
