"""Architectures of transformers with experts: PEFT computes the same as the adapted model, or a layer is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import randomise
from oracles import relative_error
from torch import Tensor, nn
from zoo.models import builder, fields, named

import hra_fx
from hra_fx.errors import UnsupportedLayerError

OF_DOTS1 = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
OF_LONGCAT = {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "num_layers": 2}
DECODERS = """
mixtral qwen2_moe qwen3_moe qwen3_next olmoe flex_olmo deepseek_v2 deepseek_v3 glm4_moe granitemoe granitemoeshared
phimoe gpt_oss llama4 dbrx jamba jetmoe ernie4_5_moe minimax lfm2_moe
"""
#: Model -> its class, sets of fields in the tables of the zoo, and its own fields.
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dots1": ("Dots1ForCausalLM", "TEXT EXPERTS", OF_DOTS1),
    "laguna": ("LagunaForCausalLM", "TEXT EXPERTS", {}),
    "nemotron_h": ("NemotronHForCausalLM", "TEXT EXPERTS", {}),
    "longcat_flash": ("LongcatFlashForCausalLM", "TEXT EXPERTS LATENT", OF_LONGCAT),
}
ARCHITECTURES = {
    **{
        entry.name.partition("/")[2]: entry.build
        for entry in named(f"transformers/{one}" for one in DECODERS.split()).values()
    },
    **{name: builder("transformers", model, fields(sets, **own)) for name, (model, sets, own) in MORE.items()},
}
#: Shared experts whose names PEFT converts, both layouts of experts, and a router with its own forward.
SOME = ("dots1", "gpt_oss", "llama4")
REASONS = re.compile(
    "is the output projection of attention|has its own forward|has groups|that another module reads|"
    "would not be found by PEFT|has a name that PEFT's LoRA does not support in Mamba models"
)


def made(kind: str) -> nn.Module:
    """A model in eval mode, with weights of the usual size."""
    torch.manual_seed(0)
    model = ARCHITECTURES[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def experts_of(model: nn.Module) -> list[str]:
    """The names of the 3-D parameters of experts."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and "Experts" in type(module).__name__
    ]


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 21).view(2, 9))[0]
    return found


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    """A copy with random adapters, by default on its experts and all layers."""
    targets = {"r": 2, "target_modules": "all-linear", "target_parameters": experts_of(base)}
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(**targets | fields))
    randomise(model)
    return model


def expressible(base: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy with adapters on everything that LoRA supports, and its outputs."""
    excluded: list[str] = []
    experts = experts_of(base)
    while True:
        model = adapted(base, target_parameters=experts or None, exclude_modules=excluded)
        wanted = outputs(model)
        try:
            hra_fx.convert_to_lora(model)
        except UnsupportedLayerError as refusal:
            path, _, reason = str(refusal).partition(": ")
            assert REASONS.search(reason), refusal
            if ".hra_" in path:
                experts = []
            else:
                excluded.append(path)
        else:
            return model, wanted


def check(base: nn.Module, folder: Path, wanted: Tensor) -> None:
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert relative_error(outputs(loaded), wanted) <= 5e-5


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow) for kind in ARCHITECTURES]
)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    base: Any = made(kind)
    model, wanted = expressible(base)
    assert relative_error(wanted, outputs(base)) > 1e-2
    hra_fx.save_as_lora(model, tmp_path / "lora")
    check(base, tmp_path / "lora", wanted)


def test_one_of_the_parameters_and_a_smaller_rank(tmp_path: Path) -> None:
    base = made("qwen3_moe")
    model = adapted(base, r=4, target_modules=None, target_parameters=["experts.down_proj"])
    rows = hra_fx.save_as_lora(model, tmp_path / "small", rank=2).rows
    assert all(row.rank == 2 and 0 < row.error < 1 for row in rows)
    hra_fx.save_as_lora(model, tmp_path / "lora")
    check(base, tmp_path / "lora", outputs(model))


REFUSED = {
    "laguna": r"1\.mlp\.shared_experts\.\w+: this layer would not be found by PEFT, which renames it to model\.",
    "nemotron_h": r"0\.mixer\.out_proj: this layer has a name that PEFT's LoRA does not support in Mamba models",
    "longcat_flash": r"0\.mlp\.router\.classifier: Linear 16->6 has a weight that another module reads, so PEFT's",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str) -> None:
    base = made(kind)
    model = adapted(base, target_parameters=None)
    with pytest.raises(UnsupportedLayerError, match=rf"^model\.layers\.{REFUSED[kind]}"):
        hra_fx.convert_to_lora(model)
