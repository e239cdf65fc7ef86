"""`target_parameters` and `rank_pattern`: they match as in PEFT's LoRA, and their errors."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from moe_models import built, experts_config
from peft.utils.other import get_pattern_key
from torch import nn

import hra_fx
from hra_fx.errors import UnsupportedLayerError

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


def test_exclude_modules_and_layer_indices_do_not_restrict_parameters() -> None:
    found = ours(["experts.down_proj"], target_modules=["q_proj"], layers_to_transform=[0], exclude_modules=["k_proj"])
    assert found == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.down_proj",
    }


def test_experts_of_a_class_without_is_transposed() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.ones(3, 4, 5))
    config = hra_fx.HRAConfig(r=2, target_parameters=["up"])
    with pytest.raises(hra_fx.SelectionError, match=r"experts.up: Module does not state .* Set the attribute"):
        hra_fx.transform(model, config)
    model["experts"].is_transposed = True
    assert hra_fx.transform(model, config)["experts"].hra_up.hra_u["default"].shape == (3, 4, 1, 2)


#: Fields of an adapter of the experts, and the error.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"target_parameters": ["q_proj.weight"]},
        r"'q_proj.weight' matches no 3-D parameter of the model. Available names: 'gate_up_proj', 'down_proj'\.",
    ),
    (
        {"modules_to_save": ["experts"]},
        r"hra_gate_up_proj: a layer cannot be both .*\. Use longer names in `target_parameters`, or use a l",
    ),
    ({"r": 17, "apply_GS": True}, r"hra_gate_up_proj .*`r` must be at most 16"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_fields_that_do_not_fit_the_model_are_refused(fields: dict[str, Any], message: str) -> None:
    kind = UnsupportedLayerError if "r" in fields else hra_fx.SelectionError
    with pytest.raises(kind, match=message):
        hra_fx.transform(built("qwen3_moe"), experts_config(**fields))
    with pytest.raises(hra_fx.SelectionError, match=r"matches no 3-D parameter of the model\."):
        hra_fx.transform(nn.Sequential(nn.Linear(2, 2)), experts_config())


# ---- rank_pattern, which matches as in PEFT's LoRA ----


WORDS = st.sampled_from(["q", "v", "k_proj", "q_proj", "layers", "0", "1", "10", "block"])
PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(PATHS, st.sampled_from([r"layers\.\d", ".*proj", "q|v", r"^q", r"[01]\.q"]))


@given(st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4), PATHS)
def test_the_first_match_is_used_as_in_lora(pattern: dict[str, int], path: str) -> None:
    wanted = pattern.get(get_pattern_key(list(pattern), path), 20)
    assert hra_fx.HRAConfig(r=20, rank_pattern=pattern).rank_of(path) == wanted
