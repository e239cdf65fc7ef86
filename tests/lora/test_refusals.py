"""Layers that LoRA does not support raise an error with their name, before anything is written.

PEFT's LoRA has no effect on a weight that another module reads.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers.reading_weights import TARGETS, USES, Reading
from lora.kinds import move
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.models import builder, fields as zoo_fields

import hra_fx
from hra_fx import HRAConfig
from hra_fx.errors import AdapterError, CheckpointError, FoldError, UnsupportedLayerError


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.9 * self.weight, self.bias)


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), "layer: Conv2d 4->6 3x3 has groups, so the change"),
    "dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2), "layer: Conv1d 4->6 3 is dilated, which PEFT's LoRA does not"),
    "padding mode": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        "layer: Conv2d 4->6 3x3 has padding_mode='reflect', but PEFT's LoRA always pads with zeros",
    ),
    "a standardized weight": (lambda: StdConv2d(4, 6, 3), "layer: Conv2d 4->6 3x3 has its own forward, for which"),
    "a padded input": (lambda: Conv2dSame(4, 6, 3, stride=2), "layer: Conv2d 4->6 3x3 has its own forward, for"),
    "a scaled weight": (lambda: Scaled(6, 4), "layer: Linear 6->4 has its own forward, for which PEFT"),
}


def adapted(model: nn.Module, **fields: Any) -> Any:
    """The model with a trained adapter, in eval mode."""
    move(hra_fx.transform(model, HRAConfig(**{"r": 2, "target_modules": "all-linear"} | fields)), 0)
    return model.eval()


def one_layer(layer: nn.Module) -> Any:
    return adapted(nn.ModuleDict({"layer": layer}), target_modules=["layer"])


def refused(model: nn.Module, kind: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        hra_fx.convert_to_lora(model, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_lora_cannot_express(name: str, tmp_path: Path) -> None:
    make, message = LAYERS[name]
    with pytest.raises(UnsupportedLayerError) as caught:
        hra_fx.save_as_lora(one_layer(make()), tmp_path / "out")
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(" (hra_fx.fold), or leave the layer out with exclude_modules.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 1, dilation=2), nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular")], ids=str
)
def test_settings_without_effect_are_accepted(layer: nn.Module, tmp_path: Path) -> None:
    assert hra_fx.save_as_lora(one_layer(layer), tmp_path).rank == 2


SHARED = nn.Linear(6, 6)


def of_a_part() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Sequential(SHARED), "b": nn.Sequential(SHARED)})
    hra_fx.transform(model["a"], HRAConfig(r=2, target_modules=["0"]))
    return model


def in_a_block(path: str, block: nn.Module) -> nn.Module:
    return hra_fx.transform(nn.ModuleDict({"block": block}), HRAConfig(r=2, target_modules=[path]))


#: Path of a layer -> the model and the reason.
PLACES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "block.linear1": (
        lambda: in_a_block("block.linear1", nn.TransformerEncoderLayer(6, 2, 8)),
        "has a weight that another module reads",
    ),
    **{
        path: (lambda path=path: in_a_block(path, nn.MultiheadAttention(6, 2)), "is an nn.MultiheadAttention or its ou")
        for path in ("block.out_proj", "block")
    },
    "a.0": (of_a_part, "is also b.0, but PEFT's LoRA would change it in one place only"),
}


@pytest.mark.parametrize("path", PLACES)
def test_a_layer_where_peft_computes_something_else(path: str) -> None:
    make, reason = PLACES[path]
    refused(copy.deepcopy(make()), UnsupportedLayerError, f"^{re.escape(path)}: .* {reason}")


@pytest.mark.needs("transformers>=5.6")
def test_a_layer_that_peft_does_not_find_by_its_name() -> None:
    model = adapted(builder("transformers", "LagunaForCausalLM", zoo_fields("TEXT EXPERTS"))())
    message = r"^model\.layers\.1\.mlp\.shared_experts\.\w+: this layer would not be found by PEFT, which renames it"
    refused(model, UnsupportedLayerError, message)


def test_a_layer_in_a_shared_module_is_supported() -> None:
    block = nn.Sequential(nn.Linear(6, 6))
    model = hra_fx.transform(nn.Sequential(block, block), HRAConfig(r=2, target_modules=["0.0"], init_weights=False))
    assert hra_fx.convert_to_lora(model)[0]["target_modules"] == ["0.0"]


def test_a_folder_with_an_hra_adapter_is_kept_and_an_old_lora_is_not(tmp_path: Path) -> None:
    model = one_layer(nn.Linear(6, 4))
    hra_fx.save_adapter(model, tmp_path / "hra")
    before = (tmp_path / "hra" / "adapter_config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"hra: contains an HRA adapter, which the LoRA would overwrite\."):
        hra_fx.save_as_lora(model, tmp_path / "hra")
    assert (tmp_path / "hra" / "adapter_config.json").read_bytes() == before
    for _ in range(2):
        hra_fx.save_as_lora(model, tmp_path / "lora")


def test_a_rank_and_a_dtype(tmp_path: Path) -> None:
    model = one_layer(nn.Linear(6, 4))
    for rank in (0, True, 2.0):
        refused(model, AdapterError, rf"^`rank` must be a positive int or None, got {rank!r}\.$", rank=rank)
    for dtype in ("int8", torch.float64):
        with pytest.raises(AdapterError) as caught:
            hra_fx.save_as_lora(model, tmp_path / "out", dtype=dtype)
        assert str(caught.value) == f"`dtype` must be one of float32, float16, bfloat16, got {dtype!r}."
    for name in ("a.ckpt", "a.PT"):
        with pytest.raises(AdapterError, match=r" pickle files are never written, got ModuleDict\. Pass a folder\.$"):
            hra_fx.save_as_lora(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_names_and_states() -> None:
    model = one_layer(nn.Linear(6, 4))
    refused(model, AdapterError, r"^the model has no adapter 'x'\. It has 'default'\.$", adapter_names="x")
    with hra_fx.disable_adapters(model):
        refused(model, AdapterError, r"^adapters are disabled\. Name the adapters, or leave the disable_adapt")
        assert hra_fx.convert_to_lora(model, "default")[0]["r"] == 2
    hra_fx.set_adapter(model, [])
    refused(model, AdapterError, r"^no adapter is active\. Name at least one of \['default'\]\.$")
    refused(nn.Linear(6, 4), AdapterError, "has no adapters")
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "b": nn.Sequential(nn.Linear(6, 6))})
    hra_fx.transform(model, HRAConfig(r=2, target_modules=["0"]))
    model["a"][0] = nn.Linear(6, 6)
    refused(model, AdapterError, r"^adapter 'default': a\.0 does not match the adapter's configuration, because")


def test_values_that_are_not_finite_or_missing() -> None:
    model = one_layer(nn.Linear(6, 4))
    with torch.no_grad():
        model["layer"].hra_u["default"][0, 0] = float("nan")
    refused(model, FoldError, r"^layer: its weight or the vectors of its adapters are not finite\.")
    model = one_layer(nn.Linear(6, 4))
    model["layer"]._parameters["weight"] = nn.Linear(6, 4, device="meta").weight
    refused(model, FoldError, r"^layer: the weight or the vectors of 'default' are on the meta device\. Load")


def test_copies_of_one_module_by_two_adapters() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 4), "head": nn.Linear(4, 2)})
    config = HRAConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    hra_fx.add_adapter(hra_fx.transform(model, config, "a"), "b", config)
    refused(model, AdapterError, r"each have a trained copy of head", adapter_names=["a", "b"])


READ = r"^{}: .* has a weight that another module reads, so PEFT's LoRA has no effect\. Fold the model instead"


class ByProperty(nn.Module):
    """Two layers, one of them in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(6, 6), nn.ModuleDict({"a": nn.Linear(6, 6)})

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight

    def helper(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix) + self.inner["a"](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


class Metadata(nn.Module):
    """Only metadata is read, and the source does not show that the layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, "fc")  # noqa: B009
        return layer(x.to(self.fc.weight.dtype)) if isinstance(self.fc.bias, Tensor) else x


SOURCES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "by a property": (ByProperty, "fc"),
    "of a part": (lambda: nn.Sequential(nn.Identity(), ByProperty()), r"1\.fc"),
    "metadata": (Metadata, None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_reads_in_the_source_of_a_model_that_was_not_run(name: str) -> None:
    make, reading = SOURCES[name]
    model = adapted(make())
    if reading is None:
        hra_fx.convert_to_lora(model)
    else:
        refused(model, UnsupportedLayerError, READ.format(reading))


@pytest.mark.parametrize("use", USES)
def test_reads_in_a_forward(use: str) -> None:
    model = adapted(Reading(use), target_modules=[*TARGETS])
    with torch.set_grad_enabled(list(USES).index(use) % 2 == 0):
        model(torch.randn(2, 6))
    refused(copy.deepcopy(model), UnsupportedLayerError, READ.format("(fc|before)") + "|is also another")


def test_a_read_outside_of_a_forward_is_ignored() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    model(torch.randn(2, 6))
    assert model[0].weight.norm() > 0 and model[0].weight.detach().sum().isfinite()
    assert hra_fx.convert_to_lora(model)[0]["r"] == 2
