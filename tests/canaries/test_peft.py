"""What hra_fx reads of PEFT: its HRA layers, its wrappers, and the hooks around a forward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from canaries.canary import canary
from integrations.peft_acceleration import test_handle
from integrations.peft_parity import test_from_peft
from lora import test_moe_architectures
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

import hra_fx
from hra_fx.integrations.peft_layers import AcceleratedLayer
from hra_fx.layers.batching import has_batch
from hra_fx.layers.peft_layers import is_peft_hra_layer, is_peft_layer
from hra_fx.selection.origin import DEFAULT_TARGETS

on_layers = functools.partial(canary, "peft", reader="hra_fx/integrations/peft_layers.py")
X = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3)


@pytest.fixture(autouse=True)
def without_pefts_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5))


def adapted(**fields: Any) -> Any:
    config = {"r": 2, "init_weights": False, "target_modules": ["0", "2"]} | fields
    return peft.get_peft_model(net(), peft.HRAConfig(**config))


@on_layers("the attributes of `HRALinear` and `HRAConv2d`", breaks="accelerate_peft")
def test_attributes_of_the_layers() -> None:
    model = adapted()
    expected = model(X)
    with hra_fx.accelerate_peft(model):
        layers = [layer for layer in model.modules() if isinstance(layer, AcceleratedLayer)]
        assert len(layers) == 2
        for layer in layers:
            assert layer.active_adapters == ["default"] and layer.merged_adapters == []
            assert layer.hra_r == {"default": 2} and layer.hra_apply_GS == {"default": False}
            assert list(layer.hra_u) == ["default"] and layer.get_base_layer() is layer.base_layer
            assert layer.acting() is not None
        assert torch.allclose(model(X), expected, atol=1e-5)
        with model.disable_adapter():
            assert [layer.acting() for layer in layers] == [None, None]
        model.merge_adapter()
        assert [layer.acting() for layer in layers] == [None, None]
        assert torch.allclose(model(X), expected, atol=1e-5)
        model.unmerge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-5)


@canary(
    "peft",
    "`_enable_peft_forward_hooks` of the inner model, which a `PeftModel` enters around forward and `generate`",
    reader="hra_fx/integrations/peft_acceleration.py",
    breaks="the batched factors of accelerate_peft: each layer would compute its own",
)
def test_around_a_forward() -> None:
    model, seen = adapted(), list[bool]()

    def look(layer: Any, *_: Any) -> None:
        seen.append(has_batch(layer.acting().hra_u))

    with hra_fx.accelerate_peft(model):
        model.base_model.model[2].register_forward_hook(look)
        model(X)
        model.get_base_model()(X)
    assert seen == [True, False]


@canary(
    "peft",
    "`BaseTunerLayer` and `HRALayer`",
    reader="hra_fx/layers/peft_layers.py",
    breaks="the refusal of models that have adapters of PEFT, and from_peft",
)
def test_layers_are_recognized() -> None:
    hra, lora = adapted(), peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    assert sum(map(is_peft_hra_layer, hra.modules())) == sum(map(is_peft_layer, hra.modules())) == 2
    assert sum(map(is_peft_layer, lora.modules())) == 2 and not any(map(is_peft_hra_layer, lora.modules()))


@canary(
    "peft",
    "its table of default targets",
    reader="hra_fx/selection/origin.py",
    breaks="configurations without target_modules: they would select other layers than in PEFT",
)
def test_default_targets() -> None:
    ours = {kind: names if isinstance(names, str) else list(names) for kind, names in DEFAULT_TARGETS.items()}
    assert ours == DEFAULTS


@on_layers(
    "`update_layer` of `HRAConv2d` and the methods that it calls", breaks="accelerate_peft of grouped convolutions"
)
def test_a_layer_that_peft_cannot_set_up() -> None:
    test_handle.test_an_oblong_kernel_starts_as_the_base_model()


@canary(
    "peft",
    "`HRALinear` and `HRAConv2d` in the module of `HRAModel`, from which it makes layers",
    reader="hra_fx/integrations/peft_acceleration.py",
    breaks="accelerate_peft() for models that are created later",
)
def test_layers_that_are_made_later() -> None:
    test_handle.test_models_made_later_are_accelerated_until_it_is_closed()


@canary(
    "peft",
    "`peft_config`, `active_adapters`, or `original_module` and `modules_to_save` of its wrappers",
    reader="hra_fx/api/from_peft.py",
    breaks="from_peft",
)
def test_a_peft_model_is_converted() -> None:
    test_from_peft.test_outputs_gradients_and_counts_are_those_of_peft("trained modules")
    test_from_peft.test_all_adapters_and_the_order_of_the_active_ones(["other", "default"])


@canary(
    "peft",
    "`ParamWrapper`: the names and shapes of the LoRA of experts",
    reader="hra_fx/lora/peft_format.py",
    breaks="the LoRA export of experts",
)
def test_lora_of_experts(tmp_path: Path) -> None:
    test_moe_architectures.test_other_configurations("qwen3_moe", {"apply_GS": True}, tmp_path)
