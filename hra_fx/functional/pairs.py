r"""Pair coordinates: the sum `m` and the difference `d` of two consecutive vectors of a chain.

With the initial length `L` of a vector and the weight `c` of differences, columns `2i` and `2i + 1` of `U` are

    u_1 = L (m + c d),    u_2 = L (m - c d).

To first order in `d`, the pair of reflections maps inputs along `m` to `d`, and inputs along `d` back to `m`. So `m`
selects inputs like a row of LoRA's `A`. At the start, `d = 0`, the gradients of `u_1` and `u_2` are opposite, and the
gradient of `m` is zero. AdamW divides a gradient by the root of its mean square. For `u_1` and `u_2`, the gradient of
`d` dominates this value, so `m` hardly changes its direction. For `m` and `d`, each gradient is divided by its own
value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def start_length(d: int, r: int) -> float:
    """The initial length `L`: the root mean square length of vectors that `householder.init_vectors` draws in pairs.

    Each entry is uniform between `-sqrt(2 / r)` and `sqrt(2 / r)`.
    """
    return math.sqrt(2 * d / (3 * r))


def to_pairs(vectors: Tensor, length: float, difference: float) -> Tensor:
    """Convert vectors `(..., d, r)` with an even `r` to pair coordinates: columns `m_0, d_0, m_1, d_1, ...`.

    `length` is `L` and `difference` is `c`.
    """
    return _sums_and_differences(vectors).mul_(_columns(vectors, 0.5 / length, 0.5 / (length * difference)))


def gradients_to_pairs(gradients: Tensor, length: float, difference: float) -> Tensor:
    """Convert gradients to pair coordinates with the transposed map. The arguments are the same as for `to_pairs`."""
    return _sums_and_differences(gradients).mul_(_columns(gradients, length, length * difference))


def from_pairs(pairs: Tensor, length: float, difference: float) -> Tensor:
    """The inverse of `to_pairs`."""
    return _sums_and_differences(pairs, difference).mul_(length)


def _sums_and_differences(values: Tensor, weight: float = 1.0) -> Tensor:
    """Each even column plus and minus `weight` times the next one."""
    # This is faster than torch.stack, which interleaves columns slowly on CPUs. A matrix product may round to TF32.
    made = torch.empty_like(values)
    torch.add(values[..., 0::2], values[..., 1::2], alpha=weight, out=made[..., 0::2])
    torch.sub(values[..., 0::2], values[..., 1::2], alpha=weight, out=made[..., 1::2])
    return made


def _columns(like: Tensor, even: float, odd: float) -> Tensor:
    """The row `(r,)` of factors for even and odd columns."""
    row = torch.full(like.shape[-1:], even, dtype=like.dtype, device=like.device)
    row[1::2] = odd
    return row
