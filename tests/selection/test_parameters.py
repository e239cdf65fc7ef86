"""`target_parameters`: which parameters it selects, as PEFT's LoRA does, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from moe_models import built, dense_experts, experts_config, randomise, vectors_of
from torch import nn
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

import hra_fx

RULES = [
    ["experts.gate_up_proj"],
    ["gate_up_proj", "experts.down_proj"],
    ["model.layers.1.mlp.experts.down_proj"],
    ["1.mlp.experts.gate_up_proj"],
]


def ours(names: list[str], **fields: object) -> set[str]:
    """The parameters that are adapted."""
    model = hra_fx.transform(built("qwen3_moe"), hra_fx.HRAConfig(r=2, target_parameters=names, **fields))
    entries = [n.partition(".hra_u.")[0] for n in model.state_dict() if ".hra_u." in n]
    return {entry.replace(".hra_", ".") for entry in entries}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("names", RULES, ids=str)
def test_the_same_parameters_as_peft_lora(names: list[str]) -> None:
    model = peft.get_peft_model(built("qwen3_moe"), peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    wanted = {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{part.parameter_name}"
        for path, part in model.named_modules()
        if type(part).__name__ == "ParamWrapper"
    }
    assert ours(names) == wanted and wanted


def test_with_modules_and_exclusions_that_do_not_restrict_parameters() -> None:
    found = ours(["experts.down_proj"], target_modules=["q_proj"], layers_to_transform=[0], exclude_modules=["k_proj"])
    assert found == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.down_proj",
    }


def test_experts_of_a_class_that_does_not_say_its_layout() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.ones(3, 4, 5))
    config = hra_fx.HRAConfig(r=2, target_parameters=["up"])
    with pytest.raises(hra_fx.SelectionError, match=r"experts.up: Module does not state .* Set the attribute"):
        hra_fx.transform(model, config)
    model["experts"].is_transposed = True
    assert hra_fx.transform(model, config)["experts"].hra_up.hra_u["default"].shape == (3, 4, 2)


#: Fields of an adapter of the experts, and the message of the refusal.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"target_parameters": ["experts.gate_up"]},
        hra_fx.SelectionError,
        r"`target_parameters`: 'experts.gate_up' matches no 3-D parameter. Did you mean",
    ),
    (
        {"target_parameters": ["q_proj.weight"]},
        hra_fx.SelectionError,
        r"q_proj.weight: `target_parameters` matches this parameter of shape \(16, 16\), but only par",
    ),
    (
        {"target_parameters": [".*gate_up_proj"]},
        hra_fx.SelectionError,
        r"'\.\*gate_up_proj' is a name and not a regex\. Use the end of a path\.",
    ),
    (
        {"modules_to_save": ["experts"]},
        hra_fx.SelectionError,
        r"`target_parameters` matches .*hra_gate_up_proj' .*\. Use longer names in `target_parameters`, or use a l",
    ),
    (
        {"r": 17, "apply_GS": True},
        hra_fx.UnsupportedLayerError,
        r"hra_gate_up_proj .*`r` must be at most 16.*, or use longer names in `target_parameters`, which leave it",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "message"), REFUSED)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        hra_fx.transform(built("qwen3_moe"), experts_config(**fields))


def test_a_model_without_such_parameters() -> None:
    with pytest.raises(hra_fx.SelectionError, match=r"Sequential has no 3-D parameters. List its layers"):
        hra_fx.transform(nn.Sequential(nn.Linear(2, 2)), experts_config())


def test_longcats_experts_equal_dense_ones() -> None:
    """Those that return their input have rows in one of the two parameters."""
    config = LongcatFlashConfig(hidden_size=8, expert_ffn_hidden_size=6, n_routed_experts=3, zero_expert_num=2)
    experts = LongcatFlashExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    base = copy.deepcopy(experts)
    model = hra_fx.transform(nn.ModuleDict({"experts": experts}), experts_config())
    randomise(model)
    for name, vectors in vectors_of(model).items():
        weight = base.get_parameter(name.removeprefix("experts."))
        weight.data = dense_experts(weight, vectors, transposed=False).detach()
    call = (torch.randn(10, 8).double(), torch.arange(20).view(10, 2) % 5, torch.rand(10, 2).double())
    torch.testing.assert_close(model["experts"](*call), base(*call), rtol=1e-9, atol=1e-9)


def test_the_field() -> None:
    assert "target_parameters" not in hra_fx.HRAConfig().to_dict()
    assert hra_fx.HRAConfig(target_parameters=[]).target_parameters is None
    config = hra_fx.HRAConfig(target_parameters=("b", "a"))
    assert hra_fx.HRAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(hra_fx.ConfigError, match=r"must be a list of names, got the str 'a'. Use \['a'\]"):
        hra_fx.HRAConfig(target_parameters="a")
    with pytest.raises(hra_fx.ConfigError, match=r"got the entry 3"):
        hra_fx.HRAConfig(target_parameters=[3])


def test_experts_of_integers() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].is_transposed = False
    model["experts"].up = nn.Parameter(torch.ones(3, 4, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        hra_fx.UnsupportedLayerError, match=r"experts.hra_up .*plain floating-point tensor, got torch.int8"
    ):
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_parameters=["up"]))
