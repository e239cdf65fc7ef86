"""The dense oracle: every reflection in float64, one after another.

It does not use hra_fx, so that a test never compares the library with itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def reflected(rows: Tensor, chain: Tensor) -> Tensor:
    """`W H_1 H_2 ... H_k` of rows `W: (n, d)` and a chain `U: (d, k)`, in float64, where `H = I - 2 u u^T / |u|^2`.

    A zero vector gives the identity. Differentiable in both.
    """
    rows = rows.double()
    for column in chain.double().unbind(dim=1):
        largest = column.detach().abs().max()
        if largest > 0:
            # Divide by the largest entry, so that squares do not overflow or underflow: the scale does not matter.
            u = column / largest
            rows = rows - torch.outer(rows @ u, 2 * u / (u @ u))
    return rows


def dense_product(chain: Tensor) -> Tensor:
    """`Q = H_1 H_2 ... H_k: (d, d)` of a chain `U: (d, k)`, in float64. Differentiable."""
    return reflected(torch.eye(chain.shape[0], dtype=torch.float64), chain)


def dense_gs(vectors: Tensor) -> Tensor:
    """Gram-Schmidt of `U: (d, r)` in float64 by the textbook recurrence, each projection run twice. Differentiable.

    The second run removes the rounding errors of the first (Kahan and Parlett's "twice is enough").
    """
    basis: list[Tensor] = []
    for column in vectors.double().unbind(dim=1):
        v = column
        for _ in range(2):
            for b in basis:
                v = v - (b @ v) * b
        basis.append(v / v.norm())
    return torch.stack(basis, dim=1)


def dense_vectors(trained: Tensor) -> Tensor:
    """`U: (d, r)` in float64, from pairs `(d, r / 2, 2)`, or from vectors as they are. Differentiable."""
    wide = trained.double()
    if wide.dim() == 2:
        return wide
    d, half, _ = wide.shape
    length = math.sqrt(d / (3 * half))
    columns = [wide[:, i, 0] + sign * 0.1 * wide[:, i, 1] for i in range(half) for sign in (1, -1)]
    return length * torch.stack(columns, dim=1)


def pairs_of(vectors: Tensor) -> Tensor:
    """The pairs `(d, r / 2, 2)` of vectors `U: (d, r)`: the inverse of `dense_vectors`."""
    d, r = vectors.shape
    first, second = vectors.double()[:, 0::2], vectors.double()[:, 1::2]
    return torch.stack([(first + second) / 2, (first - second) / 0.2], dim=-1) / math.sqrt(2 * d / (3 * r))


def gradient_of_vectors(gradient: Tensor) -> Tensor:
    """The gradient `(d, r)` of vectors, from the gradient `(d, r / 2, 2)` of their pairs."""
    d, half, _ = gradient.shape
    columns = [(gradient[:, i, 0] + sign * gradient[:, i, 1] / 0.1) / 2 for i in range(half) for sign in (1, -1)]
    return torch.stack(columns, dim=1) / math.sqrt(d / (3 * half))


def dense_chain(trained: Tensor, *, apply_GS: bool = False) -> Tensor:
    """The chain `(d, k)` of an adapter in float64 from its parameter, of pairs or of vectors. Differentiable."""
    return dense_gs(dense_vectors(trained)) if apply_GS else dense_vectors(trained)


def dense_q(trained: Tensor, *, apply_GS: bool = False) -> Tensor:
    """`Q: (d, d)` of an adapter in float64: the product of `dense_chain`. Differentiable."""
    return dense_product(dense_chain(trained, apply_GS=apply_GS))


def layer_q(layer: Any, names: Iterable[str] = ("default",)) -> Tensor:
    """`Q_a Q_b ...: (d, d)` of a layer in float64, of those adapters that it has. Differentiable in their vectors."""
    reflection = layer.hra_u
    q = torch.eye(reflection.width, dtype=torch.float64)
    for name in names:
        if name in reflection:
            q = q @ dense_q(reflection[name], apply_GS=reflection.specs[name].apply_GS)
    return q


def dense_power(q: Tensor, alpha: float) -> Tensor:
    """`exp(alpha log Q)` of a rotation without an angle of pi, by its complex eigenvalues."""
    if alpha == 1:
        return q
    values, vectors = torch.linalg.eig(q)
    return (vectors @ torch.diag(torch.exp(1j * alpha * values.angle())) @ torch.linalg.inv(vectors)).real


def dense_weight(weight: Tensor, q: Tensor) -> Tensor:
    """`W Q` in float64 and the shape of `weight`, seen as `(out, d)`. Differentiable."""
    return (weight.double().flatten(1) @ q).view(weight.shape)


def relative_error(actual: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """`|actual - wanted|_F / max(|wanted|_F, floor)` in float64, for equal shapes; 0 if both are 0.

    `floor` is for quantities whose true value may be 0, such as the gradient of `U` if `Q = -I` for every `U`.
    """
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    difference = float((actual.detach().double() - wanted.detach().double()).norm())
    return difference / max(float(wanted.detach().double().norm()), floor) if difference else 0.0
