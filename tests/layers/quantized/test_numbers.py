"""Outputs and gradients of layers with quantized weights, compared with dense products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapting import randomise
from layers.quantized.bases import (
    FEW,
    SCHEMES,
    WIDTH,
    Packed,
    adapted,
    config,
    dense,
    inputs,
    quantized,
    rotated,
    values,
)
from oracles import relative_error
from torch import Tensor, nn

import hra_fx

DYNAMIC = [name for name in SCHEMES if "dynamic" in name]


def gradients(model: nn.Sequential, output: Tensor, weights: Tensor) -> list[Tensor]:
    vectors = [model[0].hra_u["default"], model[2].hra_u["default"]]
    return list(torch.autograd.grad((output * weights).sum(), vectors))


def weighting(rows: int = 5) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_and_gradient_are_those_of_the_rotated_weight(scheme: str) -> None:
    """At the start, it is that of the base model, up to one step of 255 where inputs are rounded to 8 bits."""
    model = hra_fx.transform(quantized(scheme), config(r=3, apply_GS=scheme in FEW)).train()
    x, weights = inputs(), weighting()
    assert relative_error(model(x), quantized(scheme).train()(x)) < (1e-2 if scheme in DYNAMIC else 1e-5)
    randomise(model)
    output, wanted = model(x), dense(model, x)
    assert relative_error(output, wanted) < SCHEMES[scheme].tolerance
    assert relative_error(hra_fx.effective_weight(model[0]), rotated(model[0])) < 1e-5
    if scheme not in DYNAMIC:
        for ours, expected in zip(gradients(model, output, weights), gradients(model, wanted, weights), strict=True):
            assert relative_error(ours, expected) < 1e-5
    with torch.no_grad():
        # Without gradients, bitsandbytes rounds inputs to 8 bits.
        tolerance = max(SCHEMES[scheme].tolerance, 3e-2 if scheme == "bnb int8" else 0)
        assert relative_error(model.eval()(x), dense(model, x)) < tolerance


class Reader(nn.Module):
    """Reads the weight of a layer instead of calling it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name.startswith("ao")])
def test_another_module_reads_the_rotated_dequantized_weight(scheme: str) -> None:
    """The other module does not quantize inputs, even if the scheme does."""
    model = hra_fx.transform(Reader(quantized(scheme)[0]), config("layer"))
    randomise(model)
    x, weights = inputs(), torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ rotated(model.layer).mT + model.layer.bias.double()
    vectors = model.layer.hra_u["default"]
    assert relative_error(model(x), wanted) < 1e-5
    (ours,), (oracle,) = (torch.autograd.grad((output * weights).sum(), [vectors]) for output in (model(x), wanted))
    assert relative_error(ours, oracle) < 1e-5
    with torch.no_grad():
        assert relative_error(model(x), wanted) < 1e-5


class WithoutAutograd(Packed):
    """AWQ's kernels for GPUs return inference tensors, which autograd cannot use."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


@pytest.mark.parametrize("scheme", [*DYNAMIC, "inference tensors"])
def test_the_gradient_goes_straight_through(scheme: str) -> None:
    """The gradient of a single layer does not depend on the rounding of its input."""
    alone = nn.Sequential(WithoutAutograd(nn.Linear(WIDTH, 128)))
    model = hra_fx.transform(quantized(scheme) if scheme in DYNAMIC else alone, config("0", inference_mode=True))
    randomise(model)
    layer, x, weights = model[0], inputs(), torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    leaves = [layer.hra_u["default"].requires_grad_(), x.requires_grad_()]
    ours = torch.autograd.grad((layer(x) * weights).sum(), leaves)
    expected = torch.autograd.grad((x.double() @ rotated(layer).mT * weights).sum(), leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name.startswith("bnb")])
def test_an_evaluation_changes_neither_weights_nor_gradients(scheme: str) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes changes the layout of 4-bit weights, which stops gradients."""
    model, x, weights = adapted(scheme), inputs(), weighting()
    before, first = [values(model[0]), values(model[2])], gradients(model, model(x), weights)
    with torch.no_grad():
        model.eval()(x)
    model.state_dict()
    again = gradients(model, model.train()(x), weights)
    for old, new in zip(before + first, [values(model[0]), values(model[2]), *again], strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("scheme", ["bnb nf4", "bnb fp4 nested"])
def test_a_base_that_was_evaluated_before_is_trained(scheme: str) -> None:
    base, x, weights = quantized(scheme), inputs(), weighting()
    with torch.no_grad():
        base.eval()(x)
    model = hra_fx.transform(base, config()).train()
    randomise(model)
    ours = gradients(model, model(x), weights)
    fresh = adapted(scheme)
    for mine, expected in zip(ours, gradients(fresh, dense(fresh, x), weights), strict=True):
        assert relative_error(mine, expected) < 2e-2, (
            "scales are rounded to bfloat16, and are those of their own blocks"
        )


@pytest.mark.parametrize("scheme", FEW)
def test_several_adapters_are_switched_scaled_disabled_and_deleted(scheme: str) -> None:
    model, x, tolerance = adapted(scheme), inputs(), SCHEMES[scheme].tolerance
    alone = dense(model, x)
    hra_fx.add_adapter(model, "other", config(r=3))
    randomise(model, seed=9)
    hra_fx.set_adapter(model, ["default", "other"])
    assert relative_error(model(x), dense(model, x, "default", "other")) < tolerance
    with hra_fx.disable_adapters(model):
        assert torch.equal(model(x), quantized(scheme).train()(x))
    hra_fx.set_scale(model, "other", 0)
    assert relative_error(model(x), dense(model, x, "default")) < tolerance
    hra_fx.delete_adapter(model, "default")
    hra_fx.set_scale(model, "other", 1)
    assert relative_error(model(x), dense(model, x, "other")) < tolerance
    assert relative_error(alone, dense(model, x, "other")) > 0.1


@pytest.mark.parametrize("scheme", FEW)
def test_under_autocast(scheme: str) -> None:
    model, x, weights = adapted(scheme), inputs(), weighting()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    ours, expected = gradients(model, output, weights), gradients(model, dense(model, x), weights)
    assert relative_error(output, dense(model, x)) < max(3e-2, SCHEMES[scheme].tolerance)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, theirs) < max(5e-2, SCHEMES[scheme].tolerance)


@pytest.mark.parametrize("scheme", [name for name in FEW if name.startswith("ao")])
def test_no_floating_point_weight_is_kept_for_the_backward(scheme: str) -> None:
    """torchao itself keeps a floating-point copy of each weight."""
    model, x = adapted(scheme), inputs()
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    assert kept and not {torch.Size((64, 128)), torch.Size((128, 64)), torch.Size((128, 32))} & set(kept)


# TorchDynamo creates an object of each custom autograd function that it traces, including those of bitsandbytes.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_computes_and_trains_the_same() -> None:
    model, x, weights = adapted("bnb nf4"), inputs(), weighting()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = gradients(model, model(x), weights)
    for ours, theirs in zip(gradients(model, compiled(x), weights), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
