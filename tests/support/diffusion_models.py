"""The smallest UNet and text encoder of a Stable Diffusion pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextConfig, CLIPTextModel
from zoo.models import fields


def unet(cross_attention_dim: int = 16, **more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**fields("UNET", cross_attention_dim=cross_attention_dim, **more))


def text_encoder(words: int = 40) -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **special, vocab_size=words, max_position_embeddings=12))
