"""What hra_fx reads of diffusers' pipelines and models."""

from __future__ import annotations

from typing import Any

import diffusers
from canaries.canary import canary
from diffusion_models import unet

import hra_fx
from hra_fx.lora.diffusers_format import part_of_class, parts_of

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
