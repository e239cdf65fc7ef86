"""What users do after the first call: fold a part, edit the configuration or the model, forget to load."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from adapting import config, mlp
from torch import nn

import hra_fx
from hra_fx import AdapterError, ConfigError


class Wrapped(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[..., :4])


def keys(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if "hra_u" in name}


def test_a_model_whose_part_was_folded_is_transformed_anew() -> None:
    model = Wrapped()
    settings = config("body.0")
    hra_fx.transform(model, settings)
    hra_fx.fold(model.body)
    hra_fx.transform(model, settings)
    assert keys(model) == {"body.0.hra_u.default", "body.0.hra_u.default_anchor"}
    hra_fx.fold(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_was_replaced_is_not_passed_over() -> None:
    model = Wrapped()
    hra_fx.transform(model, config("body.0", "head"))
    model.head = nn.Linear(4, 3)
    with pytest.raises(AdapterError, match=r"so that head is not in step with its configuration\. Fold it"):
        hra_fx.transform(model, config("body.0", "head"))
    hra_fx.transform(hra_fx.fold(model), config("body.0", "head"))
    assert {name.split(".hra_u")[0] for name in keys(model)} == {"body.0", "head"}


def test_a_configuration_that_is_edited_afterwards_is_another() -> None:
    model, settings = mlp(), config("0")
    hra_fx.transform(model, settings)
    settings.r = 5
    with pytest.raises(AdapterError, match="has it already, with another configuration"):
        hra_fx.transform(model, settings)


@pytest.mark.parametrize("rank", [0, -1, "8", 2.0, True])
def test_a_configuration_that_is_edited_before_is_checked_again(rank: object) -> None:
    model, settings = mlp(), config("0")
    settings.r = rank
    with pytest.raises(ConfigError, match="`r` must be a positive int"):
        hra_fx.transform(model, settings)
    assert not keys(model)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)], ids=["Linear", "Conv2d"])
def test_vectors_without_data_do_not_compute(layer: nn.Module) -> None:
    model = hra_fx.transform(nn.Sequential(layer), config("0"), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match=r"default are on the meta device.*load_state_dict\(.*assign=True\)"):
        model(torch.randn(2, 6, *((3, 3) if isinstance(layer, nn.Conv2d) else ())))


def test_a_model_must_be_a_module() -> None:
    for wrong in ("bert-base", nn.Linear, None):
        with pytest.raises(AdapterError, match=r"^model must be a torch\.nn\.Module, got "):
            hra_fx.transform(wrong, config("0"))
    with pytest.raises(
        ConfigError, match=r"^config must be an hra_fx\.HRAConfig, got peft\.tuners\.hra\.config\.HRACo"
    ):
        hra_fx.transform(mlp(), peft.HRAConfig(target_modules=["0"]))


def test_fold_takes_one_name_as_it_is() -> None:
    model = hra_fx.transform(mlp(), config("0"))
    with pytest.raises(AdapterError, match=r"^adapter 'other': the model has no such adapter\. It has 'default'\.$"):
        hra_fx.fold(model, "other")
    assert not keys(hra_fx.fold(model, "default"))


def test_a_plan_prints_its_numbers() -> None:
    model = hra_fx.transform(mlp(), config("0"))
    lines = str(hra_fx.plan_fold(model)).splitlines()
    assert lines[0].split() == ["layer", "change", "rounding"]
    assert lines[1].split()[0] == "0"
    assert np.isfinite([float(number) for number in lines[1].split()[1:]]).all()


def test_every_refused_layer_is_named_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"^0 \(Linear\): .* Also unsupported: 2\.$"):
        hra_fx.transform(model, config("0", "1", "2"))
