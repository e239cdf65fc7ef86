"""The smallest UNet and text encoder of a Stable Diffusion pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import CLIPTextConfig, CLIPTextModel


def unet(cross_attention_dim: int = 16, **more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def text_encoder(words: int = 40) -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **special, vocab_size=words, max_position_embeddings=12))
