"""Vision models of transformers: most as image classifiers; detection, segmentation, depth and videos too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo.entry import Call, Entry
from zoo.inputs import BOTH_SIDES, SIDES, SMALL, Inputs, hugging, images, tokens

PATCHES: dict[str, Any] = SMALL | {
    "image_size": SIDES[0],
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
WINDOWS: dict[str, Any] = {
    "image_size": SIDES[0],
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "hidden_dropout_prob": 0.1,
    "drop_path_rate": 0.1,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2}
CELLS: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
PYRAMID: dict[str, Any] = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "hidden_dropout_prob": 0.1,
}
BACKBONE: dict[str, Any] = {
    "backbone_config": {"model_type": "resnet", **CELLS, "out_features": ["stage2"], "layer_type": "basic"},
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
DETECTOR: dict[str, Any] = {
    **BACKBONE,
    **BOTH_SIDES,
    "num_queries": 4,
}
MASKED: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
GPT: dict[str, Any] = {"vocab_size": 51, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
PROMPTED: dict[str, Any] = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
SAM: dict[str, Any] = {
    "vision_config": PATCHES
    | {
        "attention_dropout": 0.1,
        "output_channels": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": PROMPTED,
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}


def _noise(batch: int, side: int) -> Tensor:
    """By which a masked autoencoder sorts its patches; given, it draws none."""
    return torch.rand(batch, (side // 8) ** 2)


def _points(batch: int, side: int) -> Tensor:
    """Two points in each image `(batch, 1, 2, 2)`."""
    return torch.rand(batch, 1, 2, 2) * side


def _frames(batch: int, size: int) -> Call:
    """A short video: two frames."""
    return (), {"pixel_values": torch.randn(batch, 2, 3, SIDES[size], SIDES[size])}


def _vision(name: str, model: str, call: Inputs | None = None, *, sizes: int = 2, **config: Any) -> Entry:
    """An entry from `config`, called with square images."""
    return Entry(f"transformers/{name}", hugging(model, **config), call or images(), sizes=sizes)


FREE = images(interpolate_pos_encoding=True)

ENTRIES: list[Entry] = [
    _vision("vit", "ViTForImageClassification", FREE, **PATCHES),
    _vision("deit", "DeiTForImageClassificationWithTeacher", FREE, **PATCHES),
    _vision("beit", "BeitForImageClassification", FREE, **PATCHES, use_relative_position_bias=True),
    _vision("data2vec_vision", "Data2VecVisionForImageClassification", FREE, **PATCHES),
    _vision("vit_msn", "ViTMSNForImageClassification", FREE, **PATCHES),
    _vision(
        "vit_mae", "ViTMAEForPreTraining", images(interpolate_pos_encoding=True, noise=_noise), **PATCHES, **MASKED
    ),
    _vision("dinov2", "Dinov2ForImageClassification", **PATCHES, drop_path_rate=0.1),
    _vision("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", **PATCHES),
    _vision("dinov3_vit", "DINOv3ViTModel", **PATCHES),
    _vision("ijepa", "IJepaForImageClassification", FREE, **PATCHES),
    _vision("swin", "SwinForImageClassification", **WINDOWS),
    _vision("swinv2", "Swinv2ForImageClassification", **WINDOWS),
    _vision("focalnet", "FocalNetForImageClassification", **WINDOWS),
    _vision("convnext", "ConvNextForImageClassification", **STAGES, drop_path_rate=0.1),
    _vision("convnextv2", "ConvNextV2ForImageClassification", **STAGES, drop_path_rate=0.1),
    _vision("resnet", "ResNetForImageClassification", **CELLS, layer_type="bottleneck"),
    _vision("regnet", "RegNetForImageClassification", **CELLS, groups_width=4),
    _vision("bit", "BitForImageClassification", **CELLS, drop_path_rate=0.1, num_groups=2),
    _vision("segformer", "SegformerForSemanticSegmentation", **PYRAMID, decoder_hidden_size=16),
    _vision("poolformer", "PoolFormerForImageClassification", **PYRAMID, drop_path_rate=0.1),
    _vision("pvt", "PvtForImageClassification", sizes=1, **PYRAMID, image_size=32),
    _vision("pvt_v2", "PvtV2ForImageClassification", **PYRAMID),
    _vision("glpn", "GLPNForDepthEstimation", images((32, 64)), **PYRAMID, decoder_hidden_size=16),
    _vision("yolos", "YolosForObjectDetection", **PATCHES | {"image_size": [32, 32]}, num_detection_tokens=4),
    _vision("detr", "DetrForObjectDetection", **DETECTOR),
    _vision("conditional_detr", "ConditionalDetrForObjectDetection", **DETECTOR),
    _vision("deformable_detr", "DeformableDetrForObjectDetection", **DETECTOR | {"d_model": 32}),
    _vision("sam", "SamModel", images(input_points=_points, multimask_output=False), sizes=1, **SAM),
    _vision("videomae", "VideoMAEForVideoClassification", _frames, sizes=1, **PATCHES, num_frames=2),
    _vision("vivit", "VivitForVideoClassification", _frames, sizes=1, **PATCHES, num_frames=2, tubelet_size=[2, 8, 8]),
    _vision("timesformer", "TimesformerForVideoClassification", _frames, **PATCHES, num_frames=2),
    _vision("imagegpt", "ImageGPTForImageClassification", tokens(masked=False), **GPT),
]
