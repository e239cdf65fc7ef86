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
    "num_labels": 5,
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
    "num_labels": 5,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2, "num_labels": 5}
CELLS: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
PYRAMID: dict[str, Any] = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "hidden_dropout_prob": 0.1,
    "num_labels": 5,
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
    "num_labels": 5,
}
MASKED: dict[str, Any] = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
HIERA: dict[str, Any] = {
    "image_size": [32, 32],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "num_query_pool": 1,
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False],
    "drop_path_rate": 0.1,
    "num_labels": 5,
}
CVT: dict[str, Any] = {
    "embed_dim": [8, 16],
    "num_heads": [1, 2],
    "depth": [1, 2],
    "patch_sizes": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [2, 1],
    "mlp_ratio": [2.0, 2.0],
    "attention_drop_rate": [0.1, 0.1],
    "drop_rate": [0.1, 0.1],
    "drop_path_rate": [0.0, 0.1],
    "qkv_bias": [True, True],
    "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
    "kernel_qkv": [3, 3],
    "padding_kv": [1, 1],
    "stride_kv": [2, 2],
    "padding_q": [1, 1],
    "stride_q": [1, 1],
    "num_labels": 5,
}
LEVIT: dict[str, Any] = {
    "image_size": 32,
    "hidden_sizes": [16, 16, 16],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
    "num_labels": 5,
}
MOBILE: dict[str, Any] = {
    "hidden_sizes": [8, 16, 16],
    "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
    "num_attention_heads": 2,
    "expand_ratio": 2.0,
    "n_attn_blocks": [1, 1, 1],
    "base_attn_unit_dims": [8, 8, 8],
    "width_multiplier": 0.25,
    "num_labels": 5,
}
DEPTHWISE: dict[str, Any] = {"depth_multiplier": 0.1, "min_depth": 4, "classifier_dropout_prob": 0.1, "num_labels": 5}
EFFICIENT: dict[str, Any] = {
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 32],
    "out_channels": [32, 64],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "hidden_dim": 320,
    "dropout_rate": 0.1,
    "num_labels": 5,
}
SWIFT: dict[str, Any] = {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "mlp_ratio": 2, "num_labels": 5}
HGNET: dict[str, Any] = {
    "hidden_sizes": [16, 16],
    "depths": [1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [16, 16],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_downsample_strides": [2, 2],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 5],
    "stage_numb_of_layers": [2, 2],
    "num_labels": 5,
}
TEXTNET: dict[str, Any] = {
    "stem_out_channels": 8,
    "hidden_sizes": [8, 8, 16, 16, 16],
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
    "conv_layer_strides": [[1], [2], [2], [1]],
    "num_labels": 5,
}
DEPTH: dict[str, Any] = {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "is_hybrid": False,
}
ANYTHING: dict[str, Any] = {
    "backbone_config": {
        "model_type": "dinov2",
        **PATCHES,
        "out_features": ["stage1", "stage2"],
        "reshape_hidden_states": False,
    },
    "patch_size": 8,
    "reassemble_hidden_size": 16,
    "reassemble_factors": [2, 1],
    "neck_hidden_sizes": [8, 8],
    "fusion_hidden_size": 8,
    "head_hidden_size": 8,
}
FOUR: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_stages": 4}
UPER: dict[str, Any] = {
    "backbone_config": {"model_type": "convnext", **FOUR, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "hidden_size": 16,
    "auxiliary_channels": 8,
    "auxiliary_in_channels": 16,
    "pool_scales": [1, 2],
    "num_labels": 5,
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
    _vision("hiera", "HieraForImageClassification", sizes=1, **HIERA),
    _vision("swin", "SwinForImageClassification", **WINDOWS),
    _vision("swinv2", "Swinv2ForImageClassification", **WINDOWS),
    _vision(
        "swin2sr", "Swin2SRForImageSuperResolution", images((8, 16)), **WINDOWS | {"image_size": 16, "patch_size": 1}
    ),
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
    _vision("cvt", "CvtForImageClassification", **CVT),
    _vision("levit", "LevitForImageClassification", sizes=1, **LEVIT),
    _vision("mobilevit", "MobileViTForImageClassification", images((64, 128)), **MOBILE),
    _vision("mobilevitv2", "MobileViTV2ForImageClassification", images((64, 128)), **MOBILE),
    _vision("mobilenet_v1", "MobileNetV1ForImageClassification", **DEPTHWISE),
    _vision("mobilenet_v2", "MobileNetV2ForImageClassification", **DEPTHWISE),
    _vision("efficientnet", "EfficientNetForImageClassification", **EFFICIENT),
    _vision("swiftformer", "SwiftFormerForImageClassification", **SWIFT),
    _vision("hgnet_v2", "HGNetV2ForImageClassification", **HGNET),
    _vision("textnet", "TextNetForImageClassification", **TEXTNET),
    _vision("dpt", "DPTForDepthEstimation", **PATCHES | DEPTH),
    _vision("depth_anything", "DepthAnythingForDepthEstimation", **ANYTHING),
    _vision("glpn", "GLPNForDepthEstimation", images((32, 64)), **PYRAMID, decoder_hidden_size=16),
    _vision("upernet", "UperNetForSemanticSegmentation", **UPER),
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
