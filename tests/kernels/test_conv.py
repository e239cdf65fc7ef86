"""Adapted convolutions with frozen weights against the dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_layer import CONVOLUTIONS, F64, adapted, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn


def frozen(layer: nn.Module, r: int = 3, **options: Any) -> Any:
    model = adapted(layer, r, **options)
    model.requires_grad_(False)
    model[0].hra_u["default"].requires_grad_()
    return model


def oracle(layer: Any, vectors: Tensor, x: Tensor, *, apply_GS: bool = False, anchor: Tensor | None = None) -> Tensor:
    weight = layer.hra_base.double()
    turned = (weight.flatten(1) @ dense_q(vectors, apply_GS=apply_GS, anchor=anchor)).view_as(weight)
    bias = None if layer.bias is None else layer.bias.double()
    output: Tensor = layer._conv_forward(x.double(), turned, bias)
    return output


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("few", [False, True], ids=["many patches", "few patches"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_outputs_and_gradients_of_every_geometry(name: str, few: bool) -> None:
    layer = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, **CONVOLUTIONS[name]}, dtype=F64)
    r, apply_GS = min(6 if few else 3, layer.weight[0].numel()), list(CONVOLUTIONS).index(name) % 2 == 0
    model = frozen(layer, r, apply_GS=apply_GS)
    x = normal(1, *((1, layer.in_channels, 6, 7) if few else (2, layer.in_channels, 9, 11))).requires_grad_()
    box = model[0].hra_u
    output = model(x)
    assert output.is_contiguous()
    wanted = oracle(model[0], box["default"], x, apply_GS=apply_GS, anchor=box.anchor("default"))
    assert relative_error(output, wanted) < 1e-11
    upstream = normal(2, *output.shape)
    asked = (x, box["default"])
    for found, sought in zip(
        torch.autograd.grad(output, asked, upstream), torch.autograd.grad(wanted, asked, upstream), strict=True
    ):
        assert relative_error(found, sought, floor=1e-3) < 1e-9


@pytest.mark.parametrize("wanted", [False, True])
def test_the_memory_format_of_the_output_is_that_of_the_layer(wanted: bool) -> None:
    model = frozen(nn.Conv2d(4, 6, 3, dtype=F64)).to(memory_format=torch.channels_last)
    x = normal(1, 2, 4, 7, 7).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(wanted):
        found = model(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, oracle(model[0], model[0].hra_u["default"], x)) < 1e-12
