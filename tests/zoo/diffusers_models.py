"""Models of diffusers: denoisers, transformers, autoencoders, a ControlNet; as few blocks as show each kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo.entry import Call, Entry
from zoo.inputs import Inputs, diffusing, drawn

SIDES = (8, 16)
LENGTHS = (5, 7)
BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
UNET = BLOCKS | {"sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
SDXL = UNET | {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}
PLAIN: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "dropout": 0.1,
}
KL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
    "sample_size": 16,
}
ASYMMETRIC: dict[str, Any] = {
    "down_block_out_channels": (8, 16),
    "up_block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
MEMORY: dict[str, Any] = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
VIDEO: dict[str, Any] = UNET | {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
FRAMES: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "num_frames": 2,
}
MOTION: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    "cross_attention_dim": 16,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 4,
    "norm_num_groups": 4,
}
PIXART: dict[str, Any] = {
    "in_channels": 4,
    "caption_channels": 16,
    "cross_attention_dim": 16,
    "use_additional_conditions": False,
    "dropout": 0.1,
}
FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}
AURA: dict[str, Any] = {
    "sample_size": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 64,
}
SANA: dict[str, Any] = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "dropout": 0.1,
}
WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
DC: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}


def _steps(batch: int, _size: int) -> Tensor:
    return torch.randint(1000, (batch,))


def _states(batch: int, size: int) -> Tensor:
    """What a text encoder said `(batch, length, 16)`."""
    return torch.randn(batch, LENGTHS[size], 16)


def _told(batch: int, size: int) -> Tensor:
    """The same for each of two frames."""
    return _states(batch, size).repeat_interleave(2, 0)


def _pooled(batch: int, _size: int) -> Tensor:
    return torch.randn(batch, 16)


def _classes(batch: int, _size: int) -> Tensor:
    return torch.randint(5, (batch,))


def _latents(channels: int, name: str = "sample", **extra: Any) -> Inputs:
    """Latents `(batch, channels, side, side)`, a time step for each, and `extra`, tensors or makers."""

    def call(batch: int, size: int) -> Call:
        latents = {name: torch.randn(batch, channels, SIDES[size], SIDES[size]), "timestep": _steps(batch, size)}
        return (), latents | drawn(extra, batch, size)

    return call


def _pictures(batch: int, size: int) -> Call:
    side = 2 * SIDES[size]
    return (torch.randn(batch, 3, side, side),), {}


def _hint(batch: int, size: int) -> Tensor:
    """The picture that steers a ControlNet, eight times as large as its latents."""
    return torch.randn(batch, 3, 8 * SIDES[size], 8 * SIDES[size])


def _large(batch: int, _size: int) -> dict[str, Tensor]:
    """What SDXL adds to the time step."""
    return {"text_embeds": torch.randn(batch, 16), "time_ids": torch.rand(batch, 6)}


def _flux(batch: int, size: int) -> Call:
    """Flux's latents are a sequence of patches, with the place of each one."""
    side, length = SIDES[size] // 2, LENGTHS[size]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(side * side, 3).float()
    return (), {
        "hidden_states": torch.randn(batch, side * side, 4),
        "encoder_hidden_states": _states(batch, size),
        "pooled_projections": _pooled(batch, size),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch),
        "img_ids": places,
        "txt_ids": torch.zeros(length, 3),
    }


def _video(name: str = "sample", *, frames_first: bool = False, channels: int = 4, **extra: Any) -> Inputs:
    """Latents of two frames, `(batch, channels, 2, side, side)`, or the frames before the channels."""

    def call(batch: int, size: int) -> Call:
        order = (2, channels) if frames_first else (channels, 2)
        latents = torch.randn(batch, *order, SIDES[size], SIDES[size])
        return (), {name: latents, "timestep": _steps(batch, size)} | drawn(extra, batch, size)

    return call


def _ids(batch: int, _size: int) -> Tensor:
    """Frames a second, motion, noise `(batch, 3)`."""
    return torch.rand(batch, 3)


def _one(batch: int, _size: int) -> Tensor:
    """What an image encoder said `(batch, 1, 16)`."""
    return torch.randn(batch, 1, 16)


def _diffusers(model: str, call: Inputs, note: str = "", **config: Any) -> Entry:
    """An entry by the name of its class, with a note where the class is there twice."""
    return Entry(f"diffusers/{model}{note}", diffusing(model, **config), call)


TEXT: dict[str, Any] = {"encoder_hidden_states": _states}
JOINT = _latents(4, "hidden_states", **TEXT, pooled_projections=_pooled)
CLASSED = _latents(4, "hidden_states", class_labels=_classes)

ENTRIES: list[Entry] = [
    _diffusers("UNet2DConditionModel", _latents(4, **TEXT), **UNET, dropout=0.1),
    _diffusers("UNet2DConditionModel", _latents(4, **TEXT, added_cond_kwargs=_large), "-sdxl", **SDXL),
    _diffusers("UNet2DModel", _latents(3), **PLAIN),
    _diffusers(
        "ControlNetModel",
        _latents(4, **TEXT, controlnet_cond=_hint),
        **BLOCKS,
        conditioning_embedding_out_channels=(4, 8, 8, 8),
    ),
    _diffusers("UNet3DConditionModel", _video(**TEXT), **VIDEO),
    _diffusers("UNetMotionModel", _video(encoder_hidden_states=_told), **MOTION),
    _diffusers(
        "UNetSpatioTemporalConditionModel",
        _video(frames_first=True, channels=8, encoder_hidden_states=_one, added_time_ids=_ids),
        **FRAMES,
    ),
    _diffusers("DiTTransformer2DModel", CLASSED, **HEADS, num_embeds_ada_norm=1000, norm_num_groups=4, dropout=0.1),
    _diffusers("PixArtTransformer2DModel", _latents(4, "hidden_states", **TEXT), **HEADS, **PIXART),
    _diffusers("FluxTransformer2DModel", _flux, **FLUX),
    _diffusers("SD3Transformer2DModel", JOINT, **HEADS, **MEMORY, in_channels=4, out_channels=4, pos_embed_max_size=8),
    _diffusers("AuraFlowTransformer2DModel", _latents(4, "hidden_states", **TEXT), **AURA),
    _diffusers("SanaTransformer2DModel", _latents(4, "hidden_states", **TEXT), **SANA),
    _diffusers("WanTransformer3DModel", _video("hidden_states", **TEXT), **WAN),
    _diffusers("AutoencoderKL", _pictures, **KL),
    _diffusers("AsymmetricAutoencoderKL", _pictures, **ASYMMETRIC),
    _diffusers("VQModel", _pictures, **KL, num_vq_embeddings=8),
    _diffusers("AutoencoderDC", _pictures, **DC),
]
