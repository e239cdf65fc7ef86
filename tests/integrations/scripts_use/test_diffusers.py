"""A UNet with adapters that diffusers injects, as its scripts do for a LoRA: PEFT's HRA, and `from_peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from adapting import picture, vectors_of
from diffusers.training_utils import cast_training_params
from diffusion_pipelines import image, stable_diffusion
from one_layer import normal
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file, save_file
from torch import Tensor

import hra_fx

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LAYERS = 32


def adapted(**options: Any) -> Any:
    """A frozen UNet with a new adapter, which diffusers injects without a `PeftModel`."""
    unet = stable_diffusion().unet
    unet.requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(peft.HRAConfig(r=4, target_modules=TARGETS, **options))
    return unet


def gradients(unet: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction and the gradients of a step with gradient checkpointing."""
    cast_training_params(unet, dtype=torch.float32)
    unet.enable_gradient_checkpointing()
    noisy, text = normal(1, 2, unet.config.in_channels, 8, 8), normal(2, 2, 5, unet.config.cross_attention_dim)
    predicted = unet.train()(noisy.float(), torch.tensor([3, 500]), text.float(), return_dict=False)[0]
    predicted.square().mean().backward()
    return predicted.detach(), {name: parameter.grad for name, parameter in vectors_of(unet).items()}


def test_a_step_with_checkpointing_is_that_of_peft() -> None:
    wanted, theirs = gradients(adapted(init_weights=False))
    unet = hra_fx.from_peft(adapted(init_weights=False))
    assert not any(isinstance(part, HRALinear) for part in unet.modules())
    found, ours = gradients(unet)
    assert relative_error(found, wanted) < 1e-5
    assert ours.keys() == theirs.keys() and len(ours) == LAYERS
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) < 1e-3, name


def test_saved_loaded_given_to_a_pipeline_as_a_lora_and_folded(tmp_path: Path) -> None:
    pipe, again, served = stable_diffusion(), stable_diffusion(), stable_diffusion()
    base = image(pipe)
    pipe.unet, again.unet = adapted(init_weights=False), adapted()
    save_file(peft.get_peft_model_state_dict(pipe.unet), tmp_path / "hra.safetensors")
    peft.set_peft_model_state_dict(again.unet, load_file(tmp_path / "hra.safetensors"))
    wanted = image(pipe)
    assert relative_error(wanted, base) > 1e-2
    assert relative_error(image(again), wanted) < 1e-4
    before = picture(pipe.unet)
    assert [row.adapter for row in hra_fx.report(pipe.unet)] == ["default"] * LAYERS
    hra_fx.save_adapter(pipe.unet, tmp_path / "adapter")
    hra_fx.save_as_lora(pipe, tmp_path / "lora")
    assert picture(pipe.unet) == before
    again.unet = hra_fx.load_adapter(stable_diffusion().unet, tmp_path / "adapter")
    served.load_lora_weights(tmp_path / "lora")
    assert relative_error(image(again), wanted) < 1e-4
    assert relative_error(image(served), wanted) < 1e-3
    assert hra_fx.fold(pipe.unet) is pipe.unet and not hasattr(pipe.unet, "peft_config")
    assert not pipe.unet._hf_peft_config_loaded
    assert relative_error(image(pipe), wanted) < 1e-4
