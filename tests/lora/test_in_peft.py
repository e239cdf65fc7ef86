"""Exported adapters in PEFT's LoRA, whose outputs must be those of the adapted model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layers.quantized.bases import SCHEMES, WIDTH, adapted, quantized, values
from lora.kinds import KINDS, exported_change, move, product
from oracles import relative_error
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hra_fx
from hra_fx import HRAConfig

# PEFT asks transformers for it, and warns of every tied model that has an adapter on its output layer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True` and:UserWarning"),
]
IDS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

LANGUAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), ["q_proj", "v_proj", "down_proj"]),
    "a tied output layer": (
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        ["k_proj", "lm_head"],
    ),
    "GPT-2, Conv1D": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), ["c_attn", "c_proj", "c_fc"]),
    "Falcon, Linear with its own forward": (
        lambda: FalconForCausalLM(FalconConfig(**SIZES, hidden_size=32, bos_token_id=0, eos_token_id=1)),
        ["query_key_value", "dense"],
    ),
}


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=ids).logits
    return output


def pair(make: Callable[[], nn.Module], config: HRAConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A base model, and a copy of it with an adapter that is not at its start."""
    torch.manual_seed(seed)
    base = make()
    model = hra_fx.transform(copy.deepcopy(base), config)
    move(model, seed)
    return base, model


def loaded(base: nn.Module, folder: Path, name: str = "default") -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name).eval()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_logits_are_those_of_the_adapted_model(name: str, tmp_path: Path) -> None:
    make, targets = LANGUAGE_MODELS[name]
    base, model = pair(make, HRAConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    hra_fx.save_as_lora(model, tmp_path)
    wanted, before = logits(model), logits(base)
    lora = loaded(base, tmp_path)
    assert relative_error(logits(lora) - before, wanted - before) < 1e-5
    if "lm_head" not in targets:  # PEFT would merge into the embeddings as well
        assert relative_error(logits(lora.merge_and_unload()) - before, wanted - before) < 1e-5


@pytest.mark.parametrize("rank_pattern", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_with_its_biases_and_saved_modules(kind: str, rank_pattern: bool, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.head = KINDS[kind](), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            output = self.one(x, x, x)[0] if kind == "attention" else self.one(x)
            return torch.cat([output.flatten(), self.head(self.norm(y)).flatten()])

    config = HRAConfig(r=3, target_modules=["one"], bias="all", modules_to_save=["head"])
    base, model = pair(Net, config)
    layer: Any = base.one
    shape = (2, *layer.weight.shape[1:2], *(9,) * (layer.weight.dim() - 2)) if hasattr(layer, "stride") else (2, 5, 12)
    x, y = torch.randn(shape), torch.randn(3, 4)
    hra_fx.save_as_lora(model, tmp_path, rank_pattern=rank_pattern)
    with torch.no_grad():
        before, wanted = base.eval()(x, y), model.eval()(x, y)
        assert relative_error(loaded(base, tmp_path)(x, y) - before, wanted - before) < 1e-5


def test_target_modules_match_the_adapted_layers_only(tmp_path: Path) -> None:
    make, _ = LANGUAGE_MODELS["Llama"]
    config = HRAConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], exclude_modules=["up_proj"])
    base, model = pair(make, config)
    hra_fx.save_as_lora(model, tmp_path)
    lora = loaded(base, tmp_path)
    assert lora.targeted_module_names == ["model.layers.1.self_attn.q_proj"]
    assert relative_error(logits(lora), logits(model)) < 1e-5


@pytest.mark.parametrize("part", ["model", "model.layers.1"])
def test_a_part_that_was_transformed_is_saved_for_the_whole_model(part: str, tmp_path: Path) -> None:
    make, _ = LANGUAGE_MODELS["Llama"]
    torch.manual_seed(0)
    base = make()
    model = copy.deepcopy(base)
    hra_fx.transform(model.get_submodule(part), HRAConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all"))
    move(model.get_submodule(part), 0)
    hra_fx.save_as_lora(model, tmp_path)
    wanted, before = logits(model), logits(base)
    assert relative_error(logits(loaded(base, tmp_path)) - before, wanted - before) < 1e-5


def test_a_rank_for_a_path_that_ends_another_one(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(16, 12)}), "fc": nn.Linear(16, 12)})

    base, model = pair(make, HRAConfig(r=2, target_modules=["fc"]))
    hra_fx.add_adapter(model, "wide", HRAConfig(r=4, target_modules=["block.fc"], init_weights=False))
    hra_fx.set_adapter(model, ["default", "wide"])
    hra_fx.save_as_lora(model, tmp_path, rank_pattern=True)
    lora, x = loaded(base, tmp_path), torch.randn(3, 16)
    assert lora.peft_config["default"].rank_pattern == {"^fc": 2}
    for path in ("fc", "block.fc"):
        before, wanted = base.get_submodule(path)(x), model.get_submodule(path)(x)
        assert relative_error(lora.base_model.model.get_submodule(path)(x) - before, wanted - before) < 1e-5


def bfloat16_error(A: Tensor, B: Tensor) -> float:
    return relative_error(B.bfloat16().double() @ A.bfloat16().double(), B @ A)


def test_the_result_tells_the_rounding_error_of_each_layer(tmp_path: Path) -> None:
    make, targets = LANGUAGE_MODELS["Llama"]
    base, model = pair(make, HRAConfig(r=4, target_modules=targets))
    result = hra_fx.save_as_lora(model, tmp_path, dtype="bfloat16")
    assert (result.dtype, result.rank, result.format, result.path) == ("bfloat16", 4, "peft", tmp_path)
    exact = hra_fx.convert_to_lora(model)[1]
    for row in result.rows:
        A, B = (exact[f"base_model.model.{row.path}.lora_{name}.weight"].double() for name in "AB")
        assert row.rounding == pytest.approx(bfloat16_error(A, B), rel=1e-2)
        assert (row.rank, row.error) == (4, 0)
    wanted, before = logits(model), logits(base)
    assert relative_error(logits(loaded(base, tmp_path)) - before, wanted - before) < 4e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_factors_are_the_change_of_the_dequantized_weight(scheme: str) -> None:
    model: Any = adapted(scheme)
    _, tensors = hra_fx.convert_to_lora(model)
    for path in ("0", "2"):
        weight, q = values(model[int(path)]).double(), product(model[int(path)], ["default"])
        assert relative_error(exported_change(tensors, path), weight @ q - weight) < 1e-6


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("scheme", ["bnb nf4", "bnb fp4 nested", "ao int8", "ao int4"])
def test_peft_adds_the_change_to_the_same_quantized_base(scheme: str, tmp_path: Path) -> None:
    base, model = quantized(scheme), adapted(scheme)
    hra_fx.save_as_lora(model, tmp_path)
    lora = loaded(base, tmp_path)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    # With gradients: without them, bitsandbytes rounds the products of 4-bit weights to bfloat16.
    before, wanted, actual = base(x.requires_grad_()), model(x), lora(x)
    assert relative_error(actual - before, wanted - before) < SCHEMES[scheme].tolerance
