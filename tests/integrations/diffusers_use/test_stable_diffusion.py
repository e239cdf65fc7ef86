"""Text encoder and UNet of a Stable Diffusion pipeline, adapted as PEFT's documentation of HRA does, and put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusion_pipelines import image, quiet, stable_diffusion as pipeline
from oracles import dense_q, dense_weight, relative_error
from torch import nn
from transformers import CLIPTextModel

import hra_fx

# PEFT asks transformers for it, wherever it opens an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Pipeline = diffusers.StableDiffusionPipeline
TARGETS = {
    "text_encoder": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "unet": ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
}
WAYS: dict[str, Callable[..., Any]] = {"HRAModel": hra_fx.HRAModel, "transform": hra_fx.transform}


def adapted(way: str = "HRAModel", *, r: int = 8, random: bool = False) -> Any:
    """A pipeline whose text encoder and UNet are adapted, and assigned back as PEFT's documentation does."""
    pipe = pipeline()
    torch.manual_seed(1)
    for part, targets in TARGETS.items():
        config = hra_fx.HRAConfig(r=r, target_modules=targets, init_weights=True)
        setattr(pipe, part, WAYS[way](getattr(pipe, part), config, "default"))
        if random:
            with torch.no_grad():
                for parameter in vectors(getattr(pipe, part)).values():
                    parameter.normal_()
    return pipe


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".hra_u." in name}


def rotated(pipe: Any) -> Any:
    """The base pipeline with `W Q` in the place of every adapted `W`, by the oracle."""
    plain = pipeline()
    for part in TARGETS:
        model = getattr(pipe, part)
        buffers = dict(model.named_buffers())
        for name, u in vectors(model).items():
            path = name.partition(".hra_u.")[0]
            layer = getattr(plain, part).get_submodule(path)
            q = dense_q(u.detach(), anchor=buffers.get(f"{name}_anchor"))
            with torch.no_grad():
                layer.weight.copy_(dense_weight(layer.weight, q))
    return plain


@pytest.mark.parametrize(("way", "r"), [("HRAModel", 8), ("transform", 3)])
def test_it_starts_at_the_images_of_the_base(way: str, r: int) -> None:
    pipe = adapted(way, r=r)
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert len(vectors(pipe.text_encoder)) == 12
    assert len(vectors(pipe.unet)) == 48
    assert relative_error(image(pipe), image(pipeline())) < 1e-4


def test_every_attention_processor_gives_the_images_of_the_rotated_weights() -> None:
    pipe = adapted(random=True)
    wanted = image(rotated(pipe))
    for use in (
        lambda: None,
        pipe.enable_attention_slicing,
        pipe.disable_attention_slicing,
        lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        pipe.unet.set_default_attn_processor,
    ):
        use()
        assert relative_error(image(pipe), wanted) < 1e-4
    assert relative_error(wanted, image(pipeline())) > 1e-2


def test_saved_adapters_are_opened_by_peft_and_over_a_fresh_pipeline(tmp_path: Path) -> None:
    pipe, fresh, by_class, theirs = adapted(r=3, random=True), pipeline(), pipeline(), pipeline()
    for part in TARGETS:
        getattr(pipe, part).save_pretrained(tmp_path / part)
        files = sorted(file.name for file in (tmp_path / part).iterdir())
        assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        hra_fx.load_adapter(getattr(fresh, part), tmp_path / part)
        opened = hra_fx.HRAModel.from_pretrained(getattr(by_class, part), tmp_path / part)
        assert opened is getattr(by_class, part)
        # Injected into the model itself, which the pipeline keeps.
        peft.PeftModel.from_pretrained(getattr(theirs, part), str(tmp_path / part))
    assert torch.equal(image(fresh), image(pipe))
    assert torch.equal(image(by_class), image(pipe))
    assert relative_error(image(theirs), image(pipe)) < 1e-4


def test_a_pipeline_saved_with_adapters_inside_keeps_them_and_once_folded_it_opens(tmp_path: Path) -> None:
    """diffusers loads a UNet from a whole model only, transformers a text encoder over a base that has a name."""
    pipe = adapted(random=True)
    wanted = image(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    # Which of the two is tried first is not settled.
    with pytest.raises(OSError, match=r"no file named config\.json found in directory .*unet|couldn't connect"):
        Pipeline.from_pretrained(tmp_path)
    again = pipeline()
    for part in TARGETS:
        hra_fx.load_adapter(getattr(again, part), tmp_path, subfolder=part)
        hra_fx.fold(getattr(pipe, part))
    assert torch.equal(image(again), wanted)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert type(pipe.text_encoder) is CLIPTextModel
    pipe.save_pretrained(tmp_path / "folded")
    assert relative_error(image(quiet(Pipeline.from_pretrained(tmp_path / "folded"))), wanted) < 1e-4


@pytest.mark.parametrize("part", TARGETS)
def test_one_adapted_model_in_a_saved_pipeline_is_not_lost(part: str, tmp_path: Path) -> None:
    """transformers with PEFT opens an adapter over the base that its configuration names; diffusers refuses."""
    pipeline().save_pretrained(tmp_path / "base")
    pipe = quiet(Pipeline.from_pretrained(tmp_path / "base"))
    model = hra_fx.transform(getattr(pipe, part), hra_fx.HRAConfig(r=8, target_modules=TARGETS[part]))
    with torch.no_grad():
        for parameter in vectors(model).values():
            parameter.normal_()
    pipe.save_pretrained(tmp_path / "adapted")
    if part == "unet":
        with pytest.raises(OSError, match=r"Error no file named config\.json found in directory .*unet"):
            Pipeline.from_pretrained(tmp_path / "adapted")
    else:
        assert relative_error(image(quiet(Pipeline.from_pretrained(tmp_path / "adapted"))), image(pipe)) < 1e-4
