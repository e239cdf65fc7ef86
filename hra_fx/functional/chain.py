r"""The chain of reflections of an adapter, and the tensors that it is computed from: vectors, or pairs of them.

Pairs are the sum `m` and the difference `d` of two consecutive vectors of a chain.

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

from hra_fx.functional import householder
from hra_fx.functional.householder import working_dtype

#: How the chain of an adapter is computed, as a sum: from pairs, with Gram-Schmidt, without the kept directions.
PAIRS, GRAM_SCHMIDT, KEPT = 1, 2, 4
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
    middle, difference = (pairs if pairs.dtype.itemsize > 2 else pairs.float()).unbind(-1)
    first = torch.add(middle, difference, alpha=DIFFERENCE)
    second = torch.sub(middle, difference, alpha=DIFFERENCE)
    length = start_length(pairs.shape[-3], 2 * pairs.shape[-2])
    return torch.stack([first, second], -1).flatten(-2) * length


def vectors_of(form: int, trained: Tensor, kept: Tensor | None = None) -> Tensor:
    """The vectors `(..., d, r)` of an adapter, before Gram-Schmidt.

    Args:
        form: a sum of `PAIRS`, `GRAM_SCHMIDT` and `KEPT`.
        trained: the parameter: vectors `U: (..., d, r)`, or pairs of them, `(..., d, r / 2, 2)`. The dimensions in
            front are layers or experts.
        kept: orthonormal columns `V: (..., d, n)`, the directions that the adapter does not change.
    """
    vectors = from_pairs(trained) if form & PAIRS else trained
    return vectors if kept is None else without(vectors, kept)


def chain_of(form: int, trained: Tensor, kept: Tensor | None = None) -> Tensor:
    """The plain reflections `(..., d, r)` of an adapter: its vectors, or their Gram-Schmidt basis. See `vectors_of`.

    They are in at least float32, except for vectors that are used as they are.
    """
    vectors = from_pairs(trained) if form & PAIRS else trained  # not by `vectors_of`, because every forward runs this
    if kept is not None:
        vectors = without(vectors, kept)
    return householder.orthonormalize(vectors) if form & GRAM_SCHMIDT else vectors


def gradient_of(form: int, gradient: Tensor, trained: Tensor | None, kept: Tensor | None = None) -> Tensor:
    """The gradient of `trained`, from that of `chain_of(form, trained, kept)`. Only Gram-Schmidt needs its values."""
    if trained is not None and form & GRAM_SCHMIDT:
        with torch.enable_grad():
            own = trained.detach().requires_grad_()
            (found,) = torch.autograd.grad(chain_of(form, own, kept), own, gradient)
        return found
    if kept is not None:
        gradient = without(gradient, kept)
    if not form & PAIRS:
        return gradient
    first, second = gradient.reshape(pairs_shape(gradient.shape)).unbind(-1)
    length = start_length(*gradient.shape[-2:])
    return torch.stack([(first + second) * length, (first - second) * (length * DIFFERENCE)], -1)


def without(vectors: Tensor, kept: Tensor) -> Tensor:
    """Vectors `(..., d, r)` without their part along orthonormal columns `(..., d, n)`, in at least float32."""
    with householder.without_autocast(vectors):
        wide = vectors.to(working_dtype(vectors.dtype))
        basis = kept.to(wide.dtype)
        rest: Tensor = wide - basis @ (basis.mT @ wide)
    return rest
