r"""Pairs: the sum `m` and the difference `d` of two consecutive vectors of a chain.

An adapter trains pairs, because AdamW then learns the direction of `m`. With the initial length `L` of a vector and a
constant weight `c` of differences, columns `2i` and `2i + 1` of `U` are

    u_1 = L (m + c d),    u_2 = L (m - c d).

To first order in `d`, the pair of reflections maps inputs along `m` to `d`, and inputs along `d` back to `m`. So `m`
selects inputs like a row of LoRA's `A`. At the start, `d = 0`, the gradients of `u_1` and `u_2` are opposite, and the
gradient of `m` is zero. AdamW divides a gradient by the root of its mean square. For `u_1` and `u_2`, the gradient of
`d` dominates this value, so `m` hardly changes its direction. For `m` and `d`, each gradient is divided by its own
value.

Pairs have the shape `(..., d, r / 2, 2)`: `[..., 0]` is `m`, and `[..., 1]` is `d`. Vectors have one dimension less, so
nothing that expects vectors takes pairs for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hra_fx.functional.householder import working_dtype

#: `c`: how much a difference counts. AdamW changes all entries by about the learning rate, and `d` needs smaller steps.
DIFFERENCE = 0.1


def start_length(d: int, r: int) -> float:
    """The initial length `L`: the root mean square length of vectors that `householder.init_vectors` draws in pairs.

    Each entry is uniform between `-sqrt(2 / r)` and `sqrt(2 / r)`.
    """
    return math.sqrt(2 * d / (3 * r))


def pairs_shape(vectors: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the pairs of vectors with this shape.

    >>> pairs_shape((6, 4))
    (6, 2, 2)
    """
    return *vectors[:-1], vectors[-1] // 2, 2


def to_pairs(vectors: Tensor) -> Tensor:
    """Convert vectors `(..., d, r)` with an even `r` to pairs `(..., d, r / 2, 2)`, at least float32."""
    first, second = vectors.to(working_dtype(vectors.dtype)).reshape(pairs_shape(vectors.shape)).unbind(-1)
    length = 2 * start_length(*vectors.shape[-2:])
    return torch.stack([(first + second) / length, (first - second) / (length * DIFFERENCE)], -1)


def from_pairs(pairs: Tensor) -> Tensor:
    """The inverse of `to_pairs`: vectors `(..., d, r)`, at least float32."""
    middle, difference = pairs.to(working_dtype(pairs.dtype)).unbind(-1)
    first = torch.add(middle, difference, alpha=DIFFERENCE)
    second = torch.sub(middle, difference, alpha=DIFFERENCE)
    length = start_length(pairs.shape[-3], 2 * pairs.shape[-2])
    return torch.stack([first, second], -1).flatten(-2) * length
