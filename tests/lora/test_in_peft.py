"""Adapters as LoRA: factors compared with the dense change in float64, and PEFT's outputs with the adapted model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_models
import peft
import pytest
import torch
from functional.test_householder import quick, seeds
from hypothesis import given, settings, strategies as st
from lora.kinds import KINDS, adapted, dense_change, exported_change, move
from oracles import relative_error
from tiny import gpt2, llama
from torch import Tensor, nn

import hra_fx
from hra_fx import HRAConfig


@quick
@given(st.sampled_from(list(KINDS)), st.integers(1, 5), st.booleans(), st.booleans(), seeds)
def test_the_factors_equal_the_change_of_the_weight(kind: str, r: int, apply_GS: bool, init: bool, seed: int) -> None:
    model = adapted(kind, HRAConfig(r=r, apply_GS=apply_GS, init_weights=init, target_modules=["0"]), seed=seed)
    config, tensors = hra_fx.convert_to_lora(model)
    wanted = dense_change(model[0], ["a"])
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6
    assert config["r"] == config["lora_alpha"] == int(torch.linalg.matrix_rank(wanted, rtol=1e-7))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # They are balanced, so half precision rounds both equally.
    A, B = (torch.linalg.svdvals(tensors[f"base_model.model.0.lora_{name}.weight"].flatten(1)) for name in "AB")
    assert relative_error(A, B) < 1e-5


@settings(quick, max_examples=15)
@given(st.sampled_from(list(KINDS)), st.floats(0.05, 1), st.floats(0.05, 1), seeds)
def test_several_adapters_in_order_and_with_scales(kind: str, first: float, second: float, seed: int) -> None:
    """Scaled vectors are rounded to float32, and a small rotation is a small difference of two of them."""
    one = HRAConfig(r=2, target_modules=["0"])
    model = adapted(kind, one, HRAConfig(r=4, pairs=False, init_weights=False, target_modules=["0"]), seed=seed)
    hra_fx.set_scale(model, "a", first)
    hra_fx.set_scale(model, "b", second)
    for names in (["a", "b"], ["b", "a"], ["b"]):
        _, tensors = hra_fx.convert_to_lora(model, names)
        assert relative_error(exported_change(tensors, "0"), dense_change(model[0], names)) < 4e-6
    hra_fx.set_adapter(model, ["b", "a"])
    _, tensors = hra_fx.convert_to_lora(model)
    assert relative_error(exported_change(tensors, "0"), dense_change(model[0], ["b", "a"])) < 4e-6


@pytest.mark.parametrize(("biases", "wanted"), [(("all", "none"), "all"), (("none", "hra_only"), "lora_only")])
def test_the_bias_of_a_lora_is_that_of_the_adapter_with_the_most_biases(
    biases: tuple[str, str], wanted: str, tmp_path: Path
) -> None:
    """PEFT loads only the biases that its configuration names."""
    model = adapted("Linear", *(HRAConfig(r=2, target_modules=["0"], bias=bias) for bias in biases))
    hra_fx.save_as_lora(model, tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).bias == wanted
    x, base = torch.randn(3, 12), nn.Sequential(copy.deepcopy(hra_fx.fold(copy.deepcopy(model))[0]))
    with torch.no_grad():
        base[0].weight.copy_(model[0].hra_base)
        base[0].bias.zero_()
    torch.testing.assert_close(loaded(base, tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_is_unchanged(merged: bool) -> None:
    """For a merged adapter, the change is relative to the base weight before the merge."""
    model = adapted("Linear", HRAConfig(r=4, target_modules=["0"]))
    wanted = dense_change(model[0], ["a"])
    if merged:
        hra_fx.merge_adapter(model)
    before = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
    _, tensors = hra_fx.convert_to_lora(model)
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(value) and after[name]._version == v for name, (value, v) in before.items())


def test_a_fresh_adapter_is_zero_with_rank_one_and_a_warning() -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(12, 9)), HRAConfig(r=4, target_modules=["0"]))
    with pytest.warns(hra_fx.HRAWarning, match=r"^the adapters do not change any weight \(untrained, or at scale 0\)"):
        config, tensors = hra_fx.convert_to_lora(model)
    assert config["r"] == 1
    assert [(tuple(t.shape), int(t.count_nonzero())) for t in tensors.values()] == [((1, 12), 0), ((9, 1), 0)]


def test_a_small_change_of_a_bfloat16_model_is_kept() -> None:
    model: Any = hra_fx.transform(nn.Sequential(nn.Linear(64, 48)), HRAConfig(r=8, target_modules=["0"]))
    move(model, 1, size=0.05)
    model.to(torch.bfloat16)
    wanted = dense_change(model[0], ["default"])
    _, tensors = hra_fx.convert_to_lora(model)
    assert wanted.norm() < 0.2 * model[0].hra_base.norm()
    assert relative_error(exported_change(tensors, "0"), wanted) < 1e-6


IDS = torch.arange(3, 21).view(2, 9)


def experts(name: str) -> Callable[[], nn.Module]:
    return lambda: moe_models.built(name, torch.float32)


ATTENTION = {"target_modules": ["q_proj", "v_proj"], "bias": "all"}
ONE = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]}
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": moe_models.TARGETS}
#: Model, the part that is transformed, and fields of the configuration. Experts of GPT-OSS are `(experts, in, out)`.
LANGUAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "Llama, several ranks": (
        llama,
        "",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", "rank_pattern": {"v_proj": 6}},
    ),
    "one layer of several with its name": (llama, "", ONE),
    "the model without its head": (llama, "model", ATTENTION),
    "a block": (llama, "model.layers.1", ATTENTION),
    "GPT-2, Conv1D": (gpt2, "", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "one parameter of experts": (experts("qwen3_moe"), "", {"target_parameters": ["experts.down_proj"]}),
    **{f"experts of {name}": (experts(name), "", EXPERTS) for name in ("mixtral", "gpt_oss", "llama4", "deepseek_v3")},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=IDS).logits
    return output


def pair(make: Callable[[], nn.Module], config: HRAConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A base model, and a copy of it with a trained adapter."""
    torch.manual_seed(seed)
    base = make()
    model = hra_fx.transform(copy.deepcopy(base), config)
    move(model, seed)
    return base, model


def loaded(base: nn.Module, folder: Path, name: str = "default") -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name).eval()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.needs("transformers>=5.6") if "experts" in name else ())
        for name in LANGUAGE_MODELS
    ],
)
def test_the_logits_equal_those_of_the_adapted_model(name: str, tmp_path: Path) -> None:
    make, part, fields = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    base = make()
    model = copy.deepcopy(base)
    move(hra_fx.transform(model.get_submodule(part), HRAConfig(r=3, **fields)), 0)
    hra_fx.save_as_lora(model, tmp_path)
    wanted, before = logits(model), logits(base)
    lora = loaded(base, tmp_path)
    assert fields is not ONE or lora.targeted_module_names == ["model.layers.1.self_attn.q_proj"]
    assert relative_error(logits(lora) - before, wanted - before) < 1e-4
    assert relative_error(logits(lora.merge_and_unload()) - before, wanted - before) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_with_its_biases_and_saved_modules(kind: str, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.head = KINDS[kind](), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.one(x).flatten(), self.head(self.norm(y)).flatten()])

    config = HRAConfig(r=3, target_modules=["one"], bias="all", modules_to_save=["head"])
    base, model = pair(Net, config)
    layer: Any = base.one
    shape = (2, *layer.weight.shape[1:2], *(9,) * (layer.weight.dim() - 2)) if hasattr(layer, "stride") else (2, 5, 12)
    x, y = torch.randn(shape), torch.randn(3, 4)
    hra_fx.save_as_lora(model, tmp_path)
    with torch.no_grad():
        before, wanted = base.eval()(x, y), model.eval()(x, y)
        assert relative_error(loaded(base, tmp_path)(x, y) - before, wanted - before) < 1e-5


def test_a_lora_in_half_precision_and_its_result(tmp_path: Path) -> None:
    base, model = pair(llama, HRAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    result = hra_fx.save_as_lora(model, tmp_path, dtype="bfloat16")
    assert (result.rank, result.format, result.path) == (4, "peft", tmp_path)
    assert [*result.errors.values()] == [0] * 4
    wanted, before = logits(model), logits(base)
    assert relative_error(logits(loaded(base, tmp_path)) - before, wanted - before) < 4e-3
