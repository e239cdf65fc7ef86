"""Adapted layers on the device against float64 products: outputs, and the gradients of inputs and vectors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

import hra_fx

RANK = 8
#: Largest relative error, in the Frobenius norm. The vectors stay float32; everything else has the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def correctness(device: str, width: int, channels: int) -> Iterator[tuple[str, bool]]:
    """Check a Linear of `width` and a 3x3 Conv2d of `channels` in two dtypes, with and without Gram-Schmidt."""
    for dtype in TOLERANCE:
        for apply_GS in (False, True):
            for layer, x in _layers(width, channels):
                errors = relative_errors(layer.to(device, dtype), x.to(device, dtype), apply_GS=apply_GS)
                size = " x ".join(map(str, x.shape))
                named = str(dtype).removeprefix("torch.")
                words = f"{type(layer).__name__}, input {size}, {named}{', GS' * apply_GS}"
                detail = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
                holds = all(error <= TOLERANCE[dtype] for error in errors.values())
                yield f"{words}: relative errors: {detail}", holds


def relative_errors(layer: nn.Linear | nn.Conv2d, x: Tensor, *, apply_GS: bool) -> dict[str, float]:
    """Relative errors of an adapted layer; NaN where it computes NaN."""
    config = hra_fx.HRAConfig(r=RANK, target_modules=["layer"], apply_GS=apply_GS, init_weights=False)
    model = hra_fx.transform(nn.Sequential(OrderedDict(layer=copy.deepcopy(layer))), config)
    vectors = dict(model.named_parameters())["layer.hra_u.default"]
    x = x.requires_grad_()
    actual = model(x)
    weights = torch.randn_like(actual)
    found = (actual, *torch.autograd.grad(actual, (x, vectors), weights))

    exact_x, exact_vectors = (tensor.detach().double().requires_grad_() for tensor in (x, vectors))
    exact = dense_output(layer, exact_x, exact_vectors, apply_GS=apply_GS)
    wanted = (exact, *torch.autograd.grad(exact, (exact_x, exact_vectors), weights.double()))
    names = ("output", "gradient of the input", "gradient of the vectors")
    return {name: relative_error(*pair) for name, *pair in zip(names, found, wanted, strict=True)}


def dense_output(layer: nn.Linear | nn.Conv2d, x: Tensor, vectors: Tensor, *, apply_GS: bool) -> Tensor:
    """The output of a layer with the weight `W Q` as explicit products, which is differentiable.

    Args:
        layer: the base layer; a convolution has a padding of 1.
        x: float64 input.
        vectors: float64 pairs `(d, r / 2, 2)`, or vectors `U: (d, r)`.
        apply_GS: whether `Q` is of the orthonormalized vectors.
    """
    weight = layer.weight.detach().double()
    assert layer.bias is not None
    if vectors.dim() == 3:  # a reflection does not depend on the length of its vector
        total, difference = vectors.unbind(-1)
        vectors = torch.stack([total + 0.1 * difference, total - 0.1 * difference], dim=-1).flatten(-2)
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


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """`|actual - wanted| / |wanted|` in float64."""
    return float((actual.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def _layers(width: int, channels: int) -> Iterator[tuple[nn.Linear | nn.Conv2d, Tensor]]:
    torch.manual_seed(0)
    yield nn.Linear(width, width), torch.randn(64, width)
    yield nn.Conv2d(channels, channels, 3, padding=1), torch.randn(2, channels, 16, 16)
    yield nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, 4, 4)  # few patches for its rank
