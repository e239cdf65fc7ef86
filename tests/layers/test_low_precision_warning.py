"""Vectors that are trained in 16 bits lose most steps of an optimizer: a model warns once, and in training only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from layers.three_layers import Net, X, adapted
from one_layer import BF16, F32
from torch import nn

import hra_fx


def as_trl_does(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    return model


def by_peft(model: nn.Module) -> Any:
    config = peft.HRAConfig(r=4, target_modules=["one", "two", "three"])
    made = peft.get_peft_model(Net().to(BF16), config, autocast_adapter_dtype=False)
    hra_fx.accelerate_peft(made)
    return made.to(BF16)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "bfloat16": nn.Module.bfloat16,
    "half": nn.Module.half,
    "TRL": as_trl_does,
    "PEFT": by_peft,
}


@pytest.mark.parametrize("cast", CASTS)
def test_vectors_trained_in_16_bits_are_reported_once(cast: str) -> None:
    model = CASTS[cast](adapted(dtype=F32))
    x = X.to(next(model.parameters()).dtype)
    with torch.no_grad():
        model(x)
    copy.deepcopy(model).eval()(x)
    text = rf"^(one|a layer): its trained vectors are {x.dtype}, .* parameter\.data = parameter\.data\.float\(\) for"
    with pytest.warns(hra_fx.HRAWarning, match=text) as caught:
        for _ in range(3):
            model(x).float().sum().backward()
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ["float32 vectors", "frozen", "disabled"])
def test_what_loses_nothing_is_not_reported(kind: str) -> None:
    model = adapted(dtype=F32).bfloat16()
    if kind == "float32 vectors":  # as the warning says
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if kind == "frozen":
        model.requires_grad_(False)
    if kind == "disabled":
        hra_fx.disable_adapters(model).__enter__()
    model(X.to(BF16))
