"""A UNet trained as the scripts of diffusers train a LoRA: with PEFT's HRA, and with that accelerated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from adapting import picture, vectors_of
from diffusers.training_utils import cast_training_params
from diffusion_pipelines import image, stable_diffusion
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


def train(folder: Path, way: AbstractContextManager[Any]) -> tuple[Any, list[float]]:
    """Three steps, each saved with its state; after the first, the state is loaded again."""
    with way as handle:
        unet = adapted()
        cast_training_params(unet, dtype=torch.float32)
        unet.enable_gradient_checkpointing()
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        assert len(trained) == LAYERS
        assert all((type(m) is HRALinear) == (handle is None) for m in unet.modules() if isinstance(m, HRALinear))
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have had a process group
        accelerator = Accelerator(cpu=True)
        unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(trained, lr=1e-2))
        unet.train()
        losses = [step(unet, optimizer, accelerator, seed) for seed in range(2)]
        accelerator.save_state(str(folder))
        losses.append(step(unet, optimizer, accelerator, 2))
        accelerator.load_state(str(folder))
        losses.append(step(unet, optimizer, accelerator, 2))
    return accelerator.unwrap_model(unet), losses


def step(unet: Any, optimizer: Any, accelerator: Accelerator, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    noise, noisy = torch.randn(2, 2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    with accelerator.accumulate(unet):
        predicted = unet(noisy, torch.tensor([3, 500]), text, return_dict=False)[0]
        loss = (predicted - noise).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for p in unet.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def test_it_trains_as_with_peft(tmp_path: Path) -> None:
    theirs, wanted = train(tmp_path / "theirs", nullcontext())
    fast, got = train(tmp_path / "fast", hra_fx.accelerate_peft())
    assert got == pytest.approx(wanted, rel=1e-4)
    assert got[2] == pytest.approx(got[3], rel=1e-6), "the loaded state continues the run"
    start = vectors_of(adapted())
    for name, vectors in vectors_of(fast).items():
        assert relative_error(vectors - start[name], vectors_of(theirs)[name] - start[name]) < 1e-2, name
    states: list[dict[str, Tensor]] = [peft.get_peft_model_state_dict(unet) for unet in (fast, theirs)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == LAYERS


def test_saved_loaded_and_given_to_a_pipeline_as_a_lora(tmp_path: Path) -> None:
    pipe, again, served = stable_diffusion(), stable_diffusion(), stable_diffusion()
    base = image(pipe)
    with hra_fx.accelerate_peft():
        pipe.unet = adapted(init_weights=False)
        save_file(peft.get_peft_model_state_dict(pipe.unet), tmp_path / "hra.safetensors")
        again.unet = adapted()
    peft.set_peft_model_state_dict(again.unet, load_file(tmp_path / "hra.safetensors"))
    wanted = image(pipe)
    assert relative_error(wanted, base) > 1e-2
    assert relative_error(image(again), wanted) < 1e-4
    # The scripts' own function knows the keys of LoRA only.
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    before = picture(pipe.unet)
    hra_fx.save_as_lora(pipe, tmp_path / "lora")
    assert picture(pipe.unet) == before
    served.load_lora_weights(tmp_path / "lora")
    assert relative_error(image(served), wanted) < 1e-3
