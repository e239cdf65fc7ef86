"""What is trained after `transform`, against PEFT, and what the fold gives back."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import hra_fx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.head = nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.zeros(2))
        self.some_bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        for layer in self.body:
            x = layer(x)
        return self.head(x) + self.bias + self.some_bias


SETTINGS = {
    "none": {"bias": "none"},
    "all": {"bias": "all"},
    "hra_only": {"bias": "hra_only"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "modules_to_save, all": {"modules_to_save": ["head", "norm"], "bias": "all"},
    "modules_to_save, hra_only": {"modules_to_save": ["norm"], "bias": "hra_only"},
    "inference": {"inference_mode": True},
    "inference, modules_to_save": {"inference_mode": True, "modules_to_save": ["head"]},
}


def config(**fields: object) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(r=2, target_modules=["conv", "body.0", "body.1"], **fields)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, flag in flags(model).items() if flag}


def trained_by_peft(fields: dict[str, Any]) -> set[str]:
    settings = peft.HRAConfig(r=2, target_modules=["conv", "body.0", "body.1"], **fields)
    names = trained(peft.get_peft_model(Net(), settings))
    plain = {name.replace("base_model.model.", "").replace(".base_layer", "") for name in names}
    return {name.replace(".modules_to_save.default", "") for name in plain}


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_parameters_that_peft_trains_are_trained_and_a_fold_restores_all_flags(fields: dict[str, Any]) -> None:
    model = Net()
    model.norm.weight.requires_grad_(False)
    model.body[0].weight.requires_grad_(False)
    before = flags(model)
    hra_fx.transform(model, config(**fields))
    assert trained(model) == trained_by_peft(fields)
    if trained(model):
        model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained(model)
    twin = copy.deepcopy(model)
    assert flags(hra_fx.fold(model)) == flags(hra_fx.fold(twin)) == before


@pytest.mark.parametrize("bias", ["all", "hra_only"])
def test_inference_mode_freezes_biases_too_which_peft_leaves_trainable(bias: str) -> None:
    fields = {"inference_mode": True, "bias": bias}
    assert trained(hra_fx.transform(Net(), config(**fields))) == set()
    assert "conv.bias" in trained_by_peft(fields)


def test_flags_that_the_user_changed_stay_after_a_fold() -> None:
    model = Net()
    model.norm.requires_grad_(False)
    hra_fx.transform(model, config())
    for part in (model.norm.weight, model.conv.weight, model.head):
        part.requires_grad_(True)
    assert {name for name, flag in flags(hra_fx.fold(model)).items() if not flag} == {"norm.bias"}
    model = Net()
    model.head.requires_grad_(False)
    model = hra_fx.transform(model, config(modules_to_save=["head"]))
    model.head.weight.requires_grad_(False)
    assert {name for name, flag in flags(hra_fx.fold(model)).items() if not flag} == {"head.weight", "head.bias"}


def test_a_saved_module_stays_the_same_object_and_its_integer_parameters_are_not_trained() -> None:
    model = Net()
    head = model.head
    head.counts = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    model = hra_fx.transform(model, config(modules_to_save=["head"]))
    assert model.head is head
    assert "head.counts" not in trained(model)
    assert "head.weight" in trained(model)
