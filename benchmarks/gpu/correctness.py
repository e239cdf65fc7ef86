"""Adapted layers on the device against float64 products: outputs, and the gradients of inputs and vectors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gpu import dense
from gpu.report import Check

RANK = 8
#: Largest relative error, in the Frobenius norm. The vectors stay float32; everything else has the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def correctness(device: str, width: int, channels: int) -> Iterator[Check]:
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
                yield Check("Correctness", words, holds, f"relative errors: {detail}")


def relative_errors(layer: nn.Linear | nn.Conv2d, x: Tensor, *, apply_GS: bool) -> dict[str, float]:
    """Relative errors of an adapted layer; NaN where it computes NaN."""
    import hra_fx

    config = hra_fx.HRAConfig(r=RANK, target_modules=["layer"], apply_GS=apply_GS, init_weights=False)
    model = hra_fx.transform(nn.Sequential(OrderedDict(layer=copy.deepcopy(layer))), config)
    vectors = dict(model.named_parameters())["layer.hra_u.default"]
    x = x.requires_grad_()
    actual = model(x)
    weights = torch.randn_like(actual)
    found = (actual, *torch.autograd.grad(actual, (x, vectors), weights))

    exact_x, exact_vectors = (tensor.detach().double().requires_grad_() for tensor in (x, vectors))
    exact = dense.output(layer, exact_x, exact_vectors, apply_GS=apply_GS)
    wanted = (exact, *torch.autograd.grad(exact, (exact_x, exact_vectors), weights.double()))
    names = ("output", "gradient of the input", "gradient of the vectors")
    return {name: relative_error(*pair) for name, *pair in zip(names, found, wanted, strict=True)}


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """`|actual - wanted| / |wanted|` in float64."""
    return float((actual.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def _layers(width: int, channels: int) -> Iterator[tuple[nn.Linear | nn.Conv2d, Tensor]]:
    torch.manual_seed(0)
    yield nn.Linear(width, width), torch.randn(64, width)
    yield nn.Conv2d(channels, channels, 3, padding=1), torch.randn(2, channels, 16, 16)
    yield nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, 4, 4)  # few patches for its rank
