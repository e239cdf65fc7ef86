"""The smallest pipelines of diffusers, with the same random weights each time."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from zoo.models import fields


def unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**fields("UNET", cross_attention_dim=16))


def text_encoder(words: int = 40) -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **special, vocab_size=words, max_position_embeddings=12))


def tokenizer() -> CLIPTokenizer:
    """One that knows letters, and merges none."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)


def vae(latent_channels: int = 4) -> diffusers.AutoencoderKL:
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "latent_channels": latent_channels, "shift_factor": 0.0}
    return diffusers.AutoencoderKL(**fields("AUTOENCODER", **sizes))


def scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def projecting_text_encoder(words: int) -> CLIPTextModelWithProjection:
    config = text_encoder(words).config
    config.projection_dim = 16
    return CLIPTextModelWithProjection(config)


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    words = tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def stable_diffusion_3() -> Any:
    torch.manual_seed(0)
    words = tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=projecting_text_encoder(len(words)),
        text_encoder_2=projecting_text_encoder(len(words)),
        text_encoder_3=None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=None,
    )
    return quiet(pipe)


def flux() -> Any:
    """Without text encoders: `image` gives it random embeddings."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=1),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    return quiet(pipe)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any) -> Tensor:
    """What a pipeline draws, `(1, height, width, 3)` from 0 to 1."""
    generator = torch.Generator().manual_seed(1)
    words: dict[str, Any] = {"prompt": "a dog", "height": 16, "width": 16}
    if isinstance(pipe, diffusers.FluxPipeline):
        draw = torch.Generator().manual_seed(2)
        words["prompt_embeds"] = torch.randn(1, 5, 16, generator=draw)
        words["pooled_prompt_embeds"] = torch.randn(1, 16, generator=draw)
        del words["prompt"]
    drawn = pipe(**words, num_inference_steps=2, output_type="np", generator=generator)
    return torch.from_numpy(drawn.images)
