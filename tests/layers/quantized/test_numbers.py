"""Outputs and gradients of layers with quantized weights, compared with dense products in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import randomise
from layers.quantized.bases import (
    EXACT,
    SCHEMES,
    Packed,
    adapted,
    config,
    dense,
    inputs,
    quantized,
    rotated,
    tolerance,
    values,
)
from oracles import relative_error
from torch import Tensor, nn

import hra_fx


def check_gradients(layer: Any, x: Tensor, bound: float = 1e-5) -> None:
    """Of a layer for its vectors and its input, which do not depend on how it rounds the input."""
    weights = torch.randn(5, layer.out_features, generator=torch.Generator().manual_seed(1))
    leaves = [layer.hra_u["default"], x.requires_grad_()]
    found = torch.autograd.grad((layer(x) * weights).sum(), leaves)
    expected = torch.autograd.grad((x.double() @ rotated(layer).mT * weights).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is torch.float32 and relative_error(ours, theirs) < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_rotated_weight(scheme: str) -> None:
    """Also after an evaluation. On some CPUs, bitsandbytes would change the layout of 4-bit weights then."""
    model, x = hra_fx.transform(quantized(scheme), config()), inputs()
    # At the start, up to one step of 255 where inputs are rounded to 8 bits.
    assert relative_error(model(x), quantized(scheme)(x)) < (1e-5 if scheme in EXACT else 1e-2)
    randomise(model)
    before = [values(model[0]), values(model[2])]
    for _ in range(2):
        assert relative_error(model(x), dense(model, x)) < tolerance(scheme)
        assert relative_error(hra_fx.effective_weight(model[0]), rotated(model[0])) < 1e-5
        check_gradients(model[0], inputs())
        with torch.no_grad():  # bitsandbytes rounds inputs to 8 bits then
            bound = 3e-2 if "8bit" in scheme else tolerance(scheme)
            assert relative_error(model.eval()(x), dense(model, x)) < bound
        model.train().state_dict()
    assert all(map(torch.equal, before, [values(model[0]), values(model[2])]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_autocast(scheme: str) -> None:
    model, x = adapted(scheme), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x), dense(model, x)) < max(3e-2, tolerance(scheme))
        check_gradients(model[0], x, bound=3e-2)


@pytest.mark.parametrize("make", [SCHEMES["bitsandbytes, Linear4bit"], SCHEMES["torchao, Int8Tensor"]])
def test_a_bias_trains_with_the_vectors(make: Callable[[nn.Linear], nn.Module]) -> None:
    model, x = hra_fx.transform(nn.Sequential(make(nn.Linear(64, 32))), config("0", bias="all")), inputs()
    leaves = [model[0].hra_u["default"], model[0].bias]
    wanted = torch.autograd.grad((x.double() @ rotated(model[0]).mT + leaves[1].double()).square().sum(), leaves)
    found = torch.autograd.grad(model(x).square().sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-5


class Half(Packed):
    """A kernel for one dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float16:
            raise RuntimeError("expected float16")
        return super().forward(x)


def test_a_large_bias_does_not_hide_the_values_of_the_weight() -> None:
    """In 16 bits, outputs with the bias would have no digits of the weight."""
    layer = Half(nn.Linear(64, 32)).half()
    layer.bias += 300
    model = hra_fx.transform(nn.Sequential(layer), config("0"))
    assert relative_error(hra_fx.effective_weight(model[0]), values(model[0])) < 1e-3


@pytest.mark.parametrize("scheme", ["torchao, Int8Tensor: dynamic", "torchao, IntxUnpackedToInt8Tensor"])
def test_another_module_reads_the_rotated_dequantized_weight(scheme: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = quantized(scheme)[0]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias)

    model, x = hra_fx.transform(Reader(), config("layer")), inputs()
    randomise(model)
    output, wanted = model(x), x.double() @ rotated(model.layer).mT + model.layer.bias.double()
    assert relative_error(output, wanted) < 1e-5
    found = [torch.autograd.grad(y.square().sum(), model.layer.hra_u["default"])[0] for y in (output, wanted)]
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "torchao" in name or "hqq" in name])
def test_no_floating_point_weight_is_kept_for_the_backward(scheme: str) -> None:
    """The libraries themselves keep a copy of each weight, or the packed weight."""
    model, kept = adapted(scheme), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs()).sum().backward()
    assert kept and not {torch.Size((64, 128)), torch.Size((128, 64)), torch.Size((128, 32))} & set(kept)


# TorchDynamo creates an object of each custom autograd function that it traces, including those of bitsandbytes.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_computes_and_trains_the_same() -> None:
    model, x = adapted("bitsandbytes, Linear4bit"), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    vectors = [model[0].hra_u["default"], model[2].hra_u["default"]]
    found, expected = (torch.autograd.grad(run(x).square().sum(), vectors) for run in (compiled, model))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
