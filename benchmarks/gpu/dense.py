"""The expected output of an adapted layer, as explicit float64 products. It does not use hra_fx."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def output(layer: nn.Linear | nn.Conv2d, x: Tensor, vectors: Tensor, *, apply_GS: bool) -> Tensor:
    """The output of a layer with the weight `W Q`, differentiable.

    Args:
        layer: the base layer; a convolution has a padding of 1.
        x: float64 input.
        vectors: float64 `U: (d, r)`.
        apply_GS: whether `Q` is of the orthonormalized vectors.
    """
    weight = layer.weight.detach().double()
    assert layer.bias is not None
    rotated = (weight.flatten(1) @ product(orthonormal(vectors) if apply_GS else vectors)).view(weight.shape)
    bias = layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return functional.linear(x, rotated, bias)
    return functional.conv2d(x, rotated, bias, padding=1)


def product(vectors: Tensor) -> Tensor:
    """`Q = H_1 H_2 ... H_r: (d, d)` with `H = I - 2 u u^T / |u|^2`."""
    q = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    for u in vectors.unbind(dim=1):
        q = q - torch.outer(q @ u, u) * (2 / (u @ u))
    return q


def orthonormal(vectors: Tensor) -> Tensor:
    """Gram-Schmidt by the textbook recurrence, each projection run twice."""
    basis: list[Tensor] = []
    for column in vectors.unbind(dim=1):
        v = column
        for _ in range(2):
            for b in basis:
                v = v - (b @ v) * b
        basis.append(v / v.norm())
    return torch.stack(basis, dim=1)
