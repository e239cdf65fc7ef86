"""What an accelerated layer of PEFT computes, and merges: PEFT's results where it is right, the dense product else."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from adapting import randomise
from integrations.peft_acceleration.layers import adapted, dense_results, one_layer, results
from layers.quantized.bases import FEW, SCHEMES, WIDTH, quantized
from one_layer import BF16, CONVOLUTIONS, F32, F64, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx.layers.quantized import quant_scheme_of


def agree(got: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    floor = 1e-3 * max(float(one.detach().norm()) for one in wanted)
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other, floor=floor) < bound


@pytest.mark.parametrize("apply_GS", [False, True], ids=["plain", "GS"])
@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]], ids="+".join)
def test_adapters_act_in_the_order_of_peft_and_are_unmerged_in_the_reverse_order(
    order: list[str], apply_GS: bool
) -> None:
    model = adapted(nn.Sequential(nn.Linear(10, 6)), "0", adapter="one")
    model.add_adapter("two", peft.HRAConfig(r=2, apply_GS=apply_GS, target_modules=["0"]))
    randomise(model.double())
    x, layer = normal(1, 5, 10), model.base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    model.base_model.set_adapter(order)
    wanted = layer(x)
    deltas = [layer.get_delta_weight("two", reverse=reverse) for reverse in (False, True)]
    with hra_fx.accelerate_peft(model):
        assert relative_error(layer(x), wanted) < 1e-12
        for reverse, delta in enumerate(deltas):
            torch.testing.assert_close(layer.get_delta_weight("two", reverse=bool(reverse)), delta)
        layer.merge(adapter_names=order)
        assert relative_error(layer.base_layer(x), wanted) < 1e-12
        layer.unmerge()
        assert relative_error(layer.base_layer.weight, weight) < 1e-14
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()
        model.base_model.set_adapter("two")
        model.delete_adapter("one")
        q = dense_q(layer.hra_u["two"].detach(), apply_GS=layer.hra_apply_GS["two"])
        assert relative_error(layer(x), x @ (weight @ q).T + layer.bias) < 1e-9


@pytest.mark.parametrize("base_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_output_keeps_the_dtype_of_the_input_and_vectors_are_float32(
    kind: str, dtype: torch.dtype, base_dtype: torch.dtype
) -> None:
    base = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(4, 8, 3, groups=2)
    x = normal(1, 5, 16) if kind == "linear" else normal(1, 2, 4, 9, 8)
    layer = one_layer(base.to(base_dtype))
    wide, mixed = torch.float32 in (dtype, base_dtype), dtype is not base_dtype
    found, wanted = results(layer, x.to(dtype)), dense_results(layer, x.to(dtype))
    assert [one.dtype for one in found] == [dtype, dtype, F32]
    agree(found, wanted, 1e-5 if wide and (dtype is F32 or not mixed) else 1e-2)
    with torch.autocast("cpu", BF16):
        found = results(layer, x.to(dtype))
    assert [one.dtype for one in found] == [dtype, dtype, F32]
    agree(found, wanted, 2e-2)


class Centered(nn.Conv2d):
    """Its filters have mean zero."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True), self.bias)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_base_layer_with_a_forward_and_a_hook_of_its_own(kind: str) -> None:
    base = Doubled(8, 6, dtype=F64) if kind == "linear" else Centered(2, 3, 3, dtype=F64)
    x = normal(1, 5, 8) if kind == "linear" else normal(1, 2, 2, 6, 5)
    layer = one_layer(base)
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, given, output: seen.append(output))
    agree(results(layer, x), dense_results(layer, x), 1e-9)
    before = layer(x)
    assert relative_error(seen[0], before) < 1e-12
    layer.merge()
    assert relative_error(layer(x), before) < 1e-12


def test_an_offloaded_convolution_is_refused() -> None:
    layer = one_layer(nn.Conv2d(2, 3, 3))
    layer.base_layer.register_forward_pre_hook(lambda module, given: None)
    layer.base_layer.to("meta")
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"Conv2d 2->3 3x3: its weight is offloaded.*device_map"):
        layer(torch.ones(1, 2, 6, 5))


@pytest.mark.parametrize("scheme", [name for name in FEW if name.startswith(("bnb", "ao"))])  # PEFT's HRA has no others
def test_a_quantized_base(scheme: str) -> None:
    model = adapted(quantized(scheme), "0")
    randomise(model)
    hra_fx.accelerate_peft(model)
    layer = model.base_model.model[0]
    x = normal(1, 5, WIDTH, dtype=F32).requires_grad_()
    output = layer(x)
    packing = quant_scheme_of(layer.base_layer)
    assert packing is not None
    vectors = layer.hra_u["default"].detach().double().requires_grad_()
    q = dense_q(vectors)
    wanted = x.double() @ (packing.values(layer.base_layer).double() @ q).T + layer.base_layer.bias
    assert relative_error(output, wanted) < SCHEMES[scheme].tolerance
    got = torch.autograd.grad(output.sum(), layer.hra_u["default"])[0]
    assert relative_error(got, torch.autograd.grad(wanted.sum(), vectors)[0]) < max(1e-4, SCHEMES[scheme].tolerance)
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"Linear 64->128: its weight is quantized \(.*requantize"):
        layer.merge()
    assert not layer.merged


BASES: dict[str, Any] = {"linear": lambda dtype: nn.Linear(10, 6, dtype=dtype)} | {
    name: lambda dtype, kind=kind: nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "dtype": dtype} | kind))
    for name, kind in CONVOLUTIONS.items()
}


@pytest.mark.parametrize(("safe", "apply_GS"), [(False, True), (True, False)])
@pytest.mark.parametrize("kind", BASES)
def test_a_layer_is_the_dense_product_also_merged(kind: str, safe: bool, apply_GS: bool) -> None:
    layer = one_layer(BASES[kind](F64), r=3, apply_GS=apply_GS)
    x = normal(1, 5, 10) if isinstance(layer.base_layer, nn.Linear) else normal(1, 2, 4, 9, 8)
    parameter, before = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    wanted = dense_results(layer, x)
    agree(results(layer, x), wanted, 1e-9)
    layer.merge(safe_merge=safe)
    assert layer.merged_adapters == ["default"]
    assert layer.base_layer.weight is parameter
    assert relative_error(layer.base_layer(x), wanted[0]) < 1e-12
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert relative_error(layer.base_layer.weight, before) < 1e-14
    assert relative_error(layer(x), wanted[0]) < 1e-12
    layer.merge()
    layer.enable_adapters(False)
    assert relative_error(layer(x), layer.base_layer(x)) < 1e-12
    assert not layer.merged and relative_error(layer.base_layer.weight, before) < 1e-14


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_merge_rounds_once(dtype: torch.dtype) -> None:
    layer = one_layer(nn.Linear(64, 32, dtype=dtype), r=8)
    weight = layer.base_layer.weight.double()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, (weight @ dense_q(layer.hra_u["default"])).to(dtype))


def test_a_merge_of_values_that_are_not_finite_is_refused() -> None:
    layer = one_layer(nn.Linear(10, 6))
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.hra_u["default"][0, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
