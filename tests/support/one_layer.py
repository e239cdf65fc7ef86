"""A model of one adapted layer, compared with the dense oracle: output and every gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn

from hra_fx import HRAConfig, transform

Layer: TypeAlias = nn.Linear | nn.Conv2d
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

#: Some of all that a convolution can be; `tests/layers/test_reflection.py` draws others.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3},
    "3x5": {"kernel_size": (3, 5)},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "groups": 2},
    "everything": {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "dilation": (2, 1),
        "groups": 2,
        "padding": (2, 3),
        "padding_mode": "circular",
        "bias": False,
    },
}


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapted(base: Layer, r: int, *, apply_GS: bool = False, init_weights: bool = False, seed: int = 0) -> Any:
    """A model of one layer: a copy of `base` with random vectors. Every parameter requires a gradient."""
    config = HRAConfig(r=r, apply_GS=apply_GS, init_weights=init_weights, target_modules=["0"])
    model = transform(nn.Sequential(copy.deepcopy(base)), config)
    layer: Any = model[0]
    vectors = layer.hra_u["default"]
    with torch.no_grad():
        vectors.copy_(normal(seed, *vectors.shape, dtype=vectors.dtype))
    layer.requires_grad_()
    return model


@dataclass
class Passed:
    """The results of a forward and a backward."""

    output: Tensor
    x: Tensor
    vectors: Tensor
    weight: Tensor
    bias: Tensor | None


def upstream_for(output: Tensor) -> Tensor:
    return normal(99, *output.shape, dtype=output.dtype)


def run_layer(model: Any, x: Tensor) -> Passed:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    output.backward(upstream_for(output))
    layer = model[0]
    bias = None if layer.bias is None else layer.bias.grad
    assert x.grad is not None
    return Passed(output, x.grad, layer.hra_u["default"].grad, layer.weight.grad, bias)


def run_oracle(base: Layer, model: Any, x: Tensor, *, apply_GS: bool) -> Passed:
    """The layer `base` in float64 with the weight `W Q`."""
    reflection = model[0].hra_u
    x = x.detach().double().requires_grad_()
    vectors = reflection["default"].detach().double().requires_grad_()
    weight = base.weight.detach().double().requires_grad_()
    bias = None if base.bias is None else base.bias.detach().double().requires_grad_()
    prefix = reflection.anchor("default")
    turned = dense_weight(weight, dense_q(vectors, apply_GS=apply_GS, anchor=prefix))
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        output = copy.deepcopy(base).double()._conv_forward(x, turned, bias)
    else:
        output = nn.functional.linear(x, turned, bias)
    output.backward(upstream_for(output))
    grads = [None if leaf is None else leaf.grad for leaf in (x, vectors, weight, bias)]
    assert grads[0] is not None
    assert grads[1] is not None
    assert grads[2] is not None
    return Passed(output, grads[0], grads[1], grads[2], grads[3])


def check(base: Layer, model: Any, x: Tensor, *, apply_GS: bool, bound: float, floor: float = 0.0) -> None:
    got, wanted = run_layer(model, x), run_oracle(base, model, x, apply_GS=apply_GS)
    assert got.output.dtype == x.dtype
    assert relative_error(got.output, wanted.output) < bound
    assert relative_error(got.x, wanted.x) < bound
    assert relative_error(got.vectors, wanted.vectors, floor=floor) < bound
    # The gradient of a bfloat16 weight is rounded in any layer.
    assert relative_error(got.weight, wanted.weight) < (bound if x.dtype != BF16 else 2 * bound)
    assert (got.bias is None) == (wanted.bias is None)
    if got.bias is not None and wanted.bias is not None:
        assert relative_error(got.bias, wanted.bias) < bound
