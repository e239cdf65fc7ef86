"""Merging accelerated layers of PEFT: into the weights, out of them, and `Q` itself."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from integrations.peft_acceleration.layers import adapted, dense_results, one_layer, turn
from one_layer import BF16, CONVOLUTIONS, F32, F64, normal
from oracles import dense_q, relative_error
from torch import nn

import hra_fx

SOME = {name: CONVOLUTIONS[name] for name in ("3x3", "3x5", "dilation", "groups, reflect", "everything")}
BASES: dict[str, Any] = {"linear": lambda dtype: nn.Linear(10, 6, dtype=dtype)} | {
    name: lambda dtype, kind=kind: nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "dtype": dtype} | kind))
    for name, kind in SOME.items()
}


def inputs(layer: Any) -> torch.Tensor:
    return normal(1, 5, 10) if isinstance(layer.base_layer, nn.Linear) else normal(1, 2, 4, 9, 8)


@pytest.mark.parametrize("apply_GS", [False, True], ids=["plain", "GS"])
@pytest.mark.parametrize("safe", [False, True], ids=["plain merge", "safe merge"])
@pytest.mark.parametrize("kind", BASES)
def test_a_merged_layer_computes_the_same(kind: str, safe: bool, apply_GS: bool) -> None:
    layer = one_layer(BASES[kind](F64), r=3, apply_GS=apply_GS)
    x, parameter, before = inputs(layer), layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    wanted = dense_results(layer, x)[0]
    layer.merge(safe_merge=safe)
    assert layer.merged_adapters == ["default"]
    assert layer.base_layer.weight is parameter
    assert relative_error(layer.base_layer(x), wanted) < 1e-12
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert relative_error(layer.base_layer.weight, before) < 1e-14
    assert relative_error(layer(x), wanted) < 1e-12


def test_several_adapters_come_out_in_the_reverse_order() -> None:
    model = adapted(nn.Sequential(nn.Linear(10, 6)), "0", adapter="one")
    model.add_adapter("two", peft.HRAConfig(r=3, apply_GS=True, init_weights=False, target_modules=["0"]))
    turn(model)
    layer = model.double().base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    with hra_fx.accelerate_peft(model):
        layer.merge(adapter_names=["two", "one"])
        q = dense_q(layer.hra_u["two"], apply_GS=True) @ dense_q(layer.hra_u["one"])
        assert relative_error(layer.base_layer.weight, weight @ q) < 1e-12
        layer.unmerge()
        assert relative_error(layer.base_layer.weight, weight) < 1e-14
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()


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


@pytest.mark.parametrize("apply_GS", [False, True], ids=["plain", "GS"])
def test_the_delta_weight_is_q_and_its_gradient_pefts(apply_GS: bool) -> None:
    model = adapted(nn.Sequential(nn.Linear(10, 6)), "0", apply_GS=apply_GS).double()
    turn(model)
    layer = model.base_model.model[0]
    vectors, upstream = layer.hra_u["default"], normal(1, 10, 10)
    wanted = [layer.get_delta_weight("default", reverse=reverse) for reverse in (False, True)]
    (gradient,) = torch.autograd.grad(wanted[0], vectors, upstream)
    with hra_fx.accelerate_peft(model):
        got = [layer.get_delta_weight("default", reverse=reverse) for reverse in (False, True)]
        assert relative_error(torch.autograd.grad(got[0], vectors, upstream)[0], gradient) < 1e-9
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype is other.dtype
        assert relative_error(one, other) < 1e-12
