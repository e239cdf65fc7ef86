"""What cannot be LoRA is refused with its name before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora.kinds import move
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

import hra_fx
from hra_fx import HRAConfig
from hra_fx.errors import AdapterError, CheckpointError, FoldError, UnsupportedLayerError

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), "layer: Conv2d 4->6 3x3, groups 2 has groups, so the change"),
    "dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2), "layer: Conv1d 4->6 3 is dilated, which PEFT's LoRA does not"),
    "padding mode": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        "layer: Conv2d 4->6 3x3 has padding_mode='reflect', but PEFT's LoRA always pads with zeros",
    ),
    "a standardized weight": (lambda: StdConv2d(4, 6, 3), "layer: Conv2d 4->6 3x3 has its own forward, with which"),
    "a padded input": (lambda: Conv2dSame(4, 6, 3, stride=2), "layer: Conv2d 4->6 3x3 has its own forward, with"),
}


def one_layer(layer: nn.Module, **fields: Any) -> nn.Module:
    model = hra_fx.transform(
        nn.ModuleDict({"layer": layer}), HRAConfig(**({"r": 2, "target_modules": ["layer"]} | fields))
    )
    move(model, 0)
    return model


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_layer_that_lora_cannot_express(name: str, tmp_path: Path) -> None:
    make, message = CONVOLUTIONS[name]
    folder = tmp_path / "out"
    with pytest.raises(UnsupportedLayerError) as caught:
        hra_fx.save_as_lora(one_layer(make()), folder)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(
        "Fold the model instead (hra_fx.fold), or leave the layer out with exclude_modules."
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1, dilation=2),
        nn.Conv2d(4, 6, 3, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular"),
    ],
    ids=["dilation of one entry", "no padding", "valid"],
)
def test_settings_without_effect_are_accepted(layer: nn.Module, tmp_path: Path) -> None:
    assert hra_fx.save_as_lora(one_layer(layer), tmp_path).rank == 2


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.9 * self.weight, self.bias)


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_of_its_own_is_tried_in_float32_and_eval_mode(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"^layer: Linear 6->4 has its own forward, with which PEFT's LoRA"):
        hra_fx.convert_to_lora(one_layer(Scaled(6, 4).to(dtype)))
    model = one_layer(Dropping(6, 4).to(dtype)).train()
    before = model["layer"].hra_base
    assert hra_fx.convert_to_lora(model)[0]["r"] == 2
    assert model.training and model["layer"].hra_base is before


@pytest.mark.parametrize("name", ["linear1", "self_attn"])
def test_layers_that_an_encoder_layer_reads(name: str) -> None:
    model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(6, 2, 8)})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=[name]))
    with pytest.raises(
        UnsupportedLayerError, match=rf"^block\.{name}: .* is in an nn\.TransformerEncoderLayer, which rea"
    ):
        hra_fx.convert_to_lora(model)


def test_a_model_that_was_folded_in_part() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "b": nn.Sequential(nn.Linear(6, 6))})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=["0"]))
    hra_fx.fold(model["a"])
    with pytest.raises(
        AdapterError, match=r"^adapter 'default': a\.0 does not match the adapter's configuration, because"
    ):
        hra_fx.convert_to_lora(model)


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "model-00001-of-00002.safetensors"])
def test_the_folder_of_a_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        CheckpointError, match=rf"contains a model \({name}\), and from_pretrained would load the adapte"
    ):
        hra_fx.save_as_lora(one_layer(nn.Linear(6, 4)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_folder_of_an_hra_adapter(tmp_path: Path) -> None:
    model = one_layer(nn.Linear(6, 4))
    hra_fx.save_adapter(model, tmp_path / "hra")
    hra_fx.save_as_lora(model, tmp_path / "lora")
    hra_fx.save_as_lora(model, tmp_path / "lora")
    before = (tmp_path / "hra" / "adapter_config.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"hra: contains an HRA adapter, which the LoRA would overwrite and cannot"
    ):
        hra_fx.save_as_lora(model, tmp_path / "hra")
    assert (tmp_path / "hra" / "adapter_config.json").read_bytes() == before


def test_the_output_projection_of_an_attention() -> None:
    model = nn.ModuleDict({"layer": nn.MultiheadAttention(6, 2)})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=["layer.out_proj"]))
    with pytest.raises(
        UnsupportedLayerError, match=r"^layer\.out_proj: .* is the output projection of an attention, wh"
    ):
        hra_fx.convert_to_lora(model)


def test_a_layer_of_two_modules() -> None:
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        UnsupportedLayerError, match=r"^a\.0: this layer is also b\.0, but PEFT's LoRA would change it in"
    ):
        hra_fx.convert_to_lora(model)


def test_a_module_of_two_parents_is_one_place() -> None:
    block = nn.Sequential(nn.Linear(6, 6))
    model = hra_fx.transform(nn.Sequential(block, block), HRAConfig(r=2, target_modules=["0.0"], init_weights=False))
    assert hra_fx.convert_to_lora(model)[0]["target_modules"] == ["0.0"]


@pytest.mark.parametrize("rank", [0, -1, True, 2.0])
def test_a_rank(rank: Any) -> None:
    with pytest.raises(AdapterError, match=rf"^`rank` must be a positive int or None, got {rank!r}\.$"):
        hra_fx.convert_to_lora(one_layer(nn.Linear(6, 4)), rank=rank)


@pytest.mark.parametrize("dtype", ["int8", "half-baked", torch.float64])
def test_a_dtype(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        hra_fx.save_as_lora(one_layer(nn.Linear(6, 4)), tmp_path / "out", dtype=dtype)
    assert str(caught.value) == f"`dtype` must be one of float32, float16, bfloat16, got {dtype!r}."


def test_names_and_states() -> None:
    model = one_layer(nn.Linear(6, 4))
    with pytest.raises(AdapterError, match=r"^the model has no adapter 'x'\. It has 'default'\.$"):
        hra_fx.convert_to_lora(model, "x")
    with hra_fx.disable_adapters(model):
        with pytest.raises(
            AdapterError, match=r"^adapters are disabled\. Name the adapters, or leave the disable_adapt"
        ):
            hra_fx.convert_to_lora(model)
        assert hra_fx.convert_to_lora(model, "default")[0]["r"] == 2
    hra_fx.set_adapter(model, [])
    with pytest.raises(AdapterError, match=r"^no adapter is active\. Name at least one of \['default'\]\.$"):
        hra_fx.convert_to_lora(model)
    with pytest.raises(AdapterError, match="has no adapters"):
        hra_fx.convert_to_lora(nn.Linear(6, 4))


def test_values_that_are_not_finite_or_missing(tmp_path: Path) -> None:
    model: Any = one_layer(nn.Linear(6, 4))
    with torch.no_grad():
        model["layer"].hra_u["default"][0, 0] = float("nan")
    with pytest.raises(
        AdapterError, match=r"^layer: its weight or its vectors have NaN or infinite values\. Load or tra"
    ):
        hra_fx.save_as_lora(model, tmp_path / "out")
    with torch.device("meta"):
        empty = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    model = hra_fx.transform(nn.ModuleDict({"layer": nn.Linear(6, 4)}), HRAConfig(r=2, target_modules=["layer"]))
    model["layer"]._parameters["weight"] = empty["layer"].weight
    with pytest.raises(
        FoldError, match=r"^layer: the weight or the vectors of 'default' are on the meta device\. Load"
    ):
        hra_fx.save_as_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_of_one_module_by_two_adapters() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4), "head": nn.Linear(4, 2)})
    config = HRAConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    hra_fx.add_adapter(hra_fx.transform(model, config, "a"), "b", config)
    with pytest.raises(AdapterError, match=r"each have a trained copy of head"):
        hra_fx.convert_to_lora(model, ["a", "b"])


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=r"out: is a file\. Give a folder to save in\.$"):
        hra_fx.save_as_lora(one_layer(nn.Linear(6, 4)), file)
    assert file.read_text() == "mine"
