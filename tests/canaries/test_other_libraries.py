"""What hra_fx reads of accelerate's hooks, of diffusers, and of the quantized layers of bitsandbytes and torchao."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from canaries.canary import canary
from diffusion_models import unet
from integrations.distributed import test_dispatched, test_offloaded
from layers.quantized.bases import SCHEMES, WIDTH, quantized

import hra_fx
from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.lora.diffusers_format import part_of_class, parts_of

hooks = functools.partial(canary, "accelerate", reader="hra_fx/layers/accelerate_hooks.py")


@hooks("`_hf_hook` and `_old_forward` of a module", breaks="adapters in models with a device map or offloading")
def test_a_hooked_module() -> None:
    test_dispatched.test_hooks_come_and_go("transform, hooks, off, fold, hooks")


@hooks("`SequentialHook.hooks` and `AlignDevicesHook.offload`", breaks="adapters in offloaded models")
@pytest.mark.parametrize("way", ["CPU", "CPU, in a device map"])
def test_offloaded_layers(way: str, tmp_path: Path) -> None:
    test_offloaded.test_a_model_does_what_it_does_in_memory("mlp, whole", way, "before", tmp_path)


@hooks(
    "`weights_map`, `PrefixedDataset` or `OffloadedWeightsLoader`", breaks="fold, merge and save of offloaded models"
)
@pytest.mark.parametrize("way", ["CPU", "disk", "device map"])
def test_where_the_offloaded_tensors_are(way: str, tmp_path: Path) -> None:
    test_offloaded.test_functions_that_need_the_vectors(way, "after", tmp_path)
    test_offloaded.test_merges_and_folds_into_files(way, "after", tmp_path / "refused")


READER = "hra_fx/lora/diffusers_format.py"


@canary(
    "diffusers",
    "`PeftAdapterMixin` in `diffusers.loaders.peft`, or the class names of UNets",
    reader=READER,
    breaks="save_as_lora of a UNet or a transformer of diffusers",
)
def test_models() -> None:
    model: Any = unet()
    assert isinstance(model, diffusers.UNet2DConditionModel)
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["to_q"]))
    assert list(parts_of(model)) == ["unet"]
    transformers = ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")
    assert {part_of_class(name) for name in transformers} == {"transformer"}
    assert part_of_class("UNet2DModel") is None


@canary(
    "diffusers",
    "`_lora_loadable_modules` of a pipeline",
    reader=READER,
    breaks="save_as_lora of a pipeline: every part would be refused, or one be saved that is not loaded",
)
def test_pipelines() -> None:
    listed = {
        name: set(getattr(diffusers, f"{name}Pipeline")._lora_loadable_modules)
        for name in ("StableDiffusion", "StableDiffusion3", "Flux", "Wan")
    }
    assert listed["StableDiffusion"] == {"unet", "text_encoder"}
    assert listed["StableDiffusion3"] == {"transformer", "text_encoder", "text_encoder_2"}
    assert listed["Wan"] == {"transformer", "transformer_2"}


BREAKS = "adapters in quantized layers, and fold(requantize=True)"


def check(name: str) -> None:
    """The values of a weight, and those of another one that is quantized in the same way, are what the layer uses."""
    layer: Any = quantized(name)[0]
    scheme = quant_scheme_of(layer)
    assert scheme is not None and scheme.description(layer) == SCHEMES[name].words
    assert scheme.why_not_adapted(layer) is None
    values = scheme.values(layer)
    assert torch.allclose(columns(layer), values, atol=SCHEMES[name].tolerance)
    assert (scheme.why_not_requantized(layer) is None) is SCHEMES[name].refolds
    if SCHEMES[name].refolds:
        made = scheme.requantized(layer, values.flip(0))
        assert type(made.weight.data) is type(layer.weight.data)
        assert torch.allclose(made.values, values.flip(0), atol=0.03)
        scheme.put(layer, made.weight)
        assert torch.allclose(columns(layer), made.values, atol=SCHEMES[name].tolerance)


def columns(layer: Any) -> torch.Tensor:
    """The weight that a layer computes with."""
    with torch.no_grad(), quant_scheme_of(layer).called(layer):  # type: ignore[union-attr]
        made: torch.Tensor = layer(torch.eye(WIDTH)) - layer.bias
    return made.mT


@canary(
    "bitsandbytes",
    "`state`, `SCB` and `reset_grads` of 8-bit layers, or `quant_state` and the layout of 4-bit ones",
    reader="hra_fx/layers/quantized/bitsandbytes_layers.py",
    breaks=BREAKS,
)
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("bnb")])
def test_bitsandbytes(name: str) -> None:
    check(name)


@canary(
    "torchao",
    "the class names of its tensors, or how they keep what they were made with",
    reader="hra_fx/layers/quantized/torchao_weights.py",
    breaks=BREAKS,
)
@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("ao")])
def test_torchao(name: str) -> None:
    check(name)
    layer = quantized(name)[0]
    blocks_gradients = quant_scheme_of(layer).why_no_gradient(layer) is not None  # type: ignore[union-attr]
    assert blocks_gradients is name.endswith("dynamic"), "where it quantizes inputs too"
