"""A Stable Diffusion pipeline, adapted as PEFT's documentation of HRA does, and what diffusers calls on a model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from adapting import randomise
from diffusers.models.attention_processor import AttnProcessor
from diffusion_pipelines import image, quiet, stable_diffusion as pipeline, unet
from layers.checking import dense_weights
from model.many import refuses
from one_layer import normal
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

import hra_fx

TARGETS = {
    "text_encoder": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "unet": ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
}


def adapted(r: int = 8) -> Any:
    """A pipeline whose text encoder and UNet have random vectors, assigned back as PEFT's documentation does."""
    pipe = pipeline()
    torch.manual_seed(1)
    for part, targets in TARGETS.items():
        config = hra_fx.HRAConfig(r=r, target_modules=targets, init_weights=True)
        setattr(pipe, part, hra_fx.get_peft_model(getattr(pipe, part), config, "default"))
        randomise(getattr(pipe, part))
    return pipe


def test_every_attention_processor_gives_the_images_of_the_rotated_weights() -> None:
    pipe, plain = adapted(), pipeline()
    base = image(plain)
    for part in TARGETS:
        weights = dense_weights(getattr(plain, part), getattr(pipe, part))
        getattr(plain, part).load_state_dict(weights, strict=False)
    wanted = image(plain)
    for use in (
        lambda: None,
        pipe.enable_attention_slicing,
        pipe.disable_attention_slicing,
        lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        pipe.unet.set_default_attn_processor,
    ):
        use()
        assert relative_error(image(pipe), wanted) < 1e-4
    assert relative_error(wanted, base) > 1e-2


@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed when r is odd")  # of PEFT
def test_a_saved_pipeline_has_adapters_inside_which_peft_opens_and_once_folded_it_opens_itself(tmp_path: Path) -> None:
    pipe, fresh, theirs = adapted(r=3), pipeline(), pipeline()
    wanted = image(pipe)
    pipe.save_pretrained(tmp_path)
    for part in TARGETS:
        files = sorted(file.name for file in (tmp_path / part).iterdir())
        assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        hra_fx.load_adapter(getattr(fresh, part), tmp_path, subfolder=part)
        # Injected into the model itself, which the pipeline keeps.
        peft.PeftModel.from_pretrained(getattr(theirs, part), str(tmp_path / part))
        hra_fx.fold(getattr(pipe, part))
    assert torch.equal(image(fresh), wanted)
    assert relative_error(image(theirs), wanted) < 1e-4
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert type(pipe.text_encoder) is CLIPTextModel
    pipe.save_pretrained(tmp_path / "folded")
    assert relative_error(image(quiet(type(pipe).from_pretrained(tmp_path / "folded"))), wanted) < 1e-4


CONFIG = hra_fx.HRAConfig(r=2, target_modules=["to_q", "to_k"], init_weights=False)


def fresh() -> Any:
    """The same random UNet each time."""
    torch.manual_seed(0)
    return unet().double().eval()


def run(model: Any) -> Tensor:
    latents, states = normal(1, 2, 4, 8, 8), normal(2, 2, 5, 16)
    with torch.no_grad():
        found: Tensor = model(latents, torch.tensor([3, 400]), states).sample
    return found


def test_the_class_of_an_adapted_model_builds_and_loads_base_models(tmp_path: Path) -> None:
    plain, model = fresh(), hra_fx.transform(fresh(), CONFIG)
    assert inspect.signature(type(model).__init__) == inspect.signature(type(plain).__init__)
    plain.save_pretrained(tmp_path)
    for built in (type(model).from_config(model.config), model.from_pretrained(tmp_path)):
        assert built.state_dict().keys() == plain.state_dict().keys()
        built.load_state_dict(plain.state_dict())
        assert torch.equal(run(built.double().eval()), run(plain.float().double()))


def test_projections_are_not_fused_under_reflections_and_are_after_a_fold() -> None:
    model = hra_fx.transform(fresh(), CONFIG)
    wanted = run(model)
    with refuses(model, r"^UNet2DConditionModel: fuse_qkv_projections would replace adapted .* after hra_fx\.fold"):
        model.fuse_qkv_projections()
    folded = hra_fx.fold(model)
    folded.fuse_qkv_projections()
    assert relative_error(run(folded), wanted) < 1e-12
    assert any("to_qkv" in name for name, _ in folded.named_modules())


# ---- adapters that diffusers injects, as its scripts do for a LoRA ----


def injected(**options: Any) -> Any:
    """A frozen UNet with a new adapter, which diffusers injects without a `PeftModel`."""
    unet = pipeline().unet
    unet.requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(peft.HRAConfig(r=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"], **options))
    return unet


def test_saved_loaded_given_to_a_pipeline_as_a_lora_and_folded(tmp_path: Path) -> None:
    pipe, again, served = pipeline(), pipeline(), pipeline()
    base = image(pipe)
    pipe.unet, again.unet = injected(init_weights=False), injected()
    save_file(peft.get_peft_model_state_dict(pipe.unet), tmp_path / "hra.safetensors")
    peft.set_peft_model_state_dict(again.unet, load_file(tmp_path / "hra.safetensors"))
    wanted = image(pipe)
    assert relative_error(wanted, base) > 1e-2
    assert relative_error(image(again), wanted) < 1e-4
    again.unet = hra_fx.from_peft(again.unet)
    assert not any(isinstance(part, HRALinear) for part in again.unet.modules())
    assert relative_error(image(again), wanted) < 1e-4
    hra_fx.from_peft(pipe.unet)
    assert [row.adapter for row in hra_fx.report(pipe.unet)] == ["default"] * 32
    hra_fx.save_adapter(pipe.unet, tmp_path / "adapter")
    hra_fx.save_as_lora(pipe, tmp_path / "lora")
    again.unet = hra_fx.load_adapter(pipeline().unet, tmp_path / "adapter")
    served.load_lora_weights(tmp_path / "lora")
    assert relative_error(image(again), wanted) < 1e-4
    assert relative_error(image(served), wanted) < 1e-3
    assert hra_fx.fold(pipe.unet) is pipe.unet and not hasattr(pipe.unet, "peft_config")
    assert not pipe.unet._hf_peft_config_loaded
    assert relative_error(image(pipe), wanted) < 1e-4
