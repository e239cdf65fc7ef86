"""The smallest pipelines of diffusers, with the same random weights each time."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from zoo.models import fields

#: Of a transformer.
_SIZES: dict[str, Any] = {"in_channels": 4, "num_attention_heads": 2}


def unet(cross_attention_dim: int = 16, **more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**fields("UNET", cross_attention_dim=cross_attention_dim, **more))


def tokenizer() -> CLIPTokenizer:
    """One that knows letters, and merges none."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)


def text_encoder(kind: type[Any] = CLIPTextModel) -> Any:
    words = len(tokenizer())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1, "projection_dim": 16}
    return kind(CLIPTextConfig(**sizes, **special, vocab_size=words, max_position_embeddings=12))


def vae(latent_channels: int = 4) -> diffusers.AutoencoderKL:
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "latent_channels": latent_channels, "shift_factor": 0.0}
    return diffusers.AutoencoderKL(**fields("AUTOENCODER", **sizes))


def scheduler() -> diffusers.DDIMScheduler:
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    parts = vae(), text_encoder(), tokenizer(), unet(), scheduler(), None, None
    return quiet(diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False))


def stable_diffusion_xl() -> Any:
    torch.manual_seed(0)
    larger = unet(
        **{"cross_attention_dim": 32, "use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4},
        projection_class_embeddings_input_dim=40,
    )
    encoders = text_encoder(), text_encoder(CLIPTextModelWithProjection), tokenizer(), tokenizer()
    return quiet(diffusers.StableDiffusionXLPipeline(vae(), *encoders, larger, scheduler(), add_watermarker=False))


def stable_diffusion_3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        **_SIZES,
        **{"sample_size": 8, "patch_size": 1, "num_layers": 2, "attention_head_dim": 8, "out_channels": 4},
        **{"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32},
    )
    first, second = (text_encoder(CLIPTextModelWithProjection) for _ in range(2))
    texts = first, tokenizer(), second, tokenizer(), None, None
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.StableDiffusion3Pipeline(transformer, flow, vae(), *texts))


def flux() -> Any:
    """Without text encoders: `image` gives it random embeddings."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        **_SIZES,
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "joint_attention_dim": 16},
        **{"pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)},
    )
    flow, nothing = diffusers.FlowMatchEulerDiscreteScheduler(), [None] * 4
    return quiet(diffusers.FluxPipeline(flow, vae(latent_channels=1), *nothing, transformer))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any) -> Tensor:
    """What a pipeline draws, `(1, height, width, 3)` from 0 to 1."""
    generator, draw = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    words: dict[str, Any] = {"prompt": "a dog"}
    if isinstance(pipe, diffusers.FluxPipeline):
        words = {"prompt_embeds": torch.randn(1, 5, 16, generator=draw)}
        words["pooled_prompt_embeds"] = torch.randn(1, 16, generator=draw)
    drawn = pipe(**words, height=16, width=16, num_inference_steps=2, output_type="np", generator=generator)
    return torch.from_numpy(drawn.images)
