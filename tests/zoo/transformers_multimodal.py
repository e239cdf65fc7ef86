"""Models of transformers that take text and images together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo.entry import Call, Entry
from zoo.inputs import LENGTHS, SMALL, TEXT, Inputs, drawn, hugging, padding, words

SIDE = 32
IMAGE = 49  # the token that stands for a part of an image
WORDS: dict[str, Any] = TEXT | {
    "hidden_dropout_prob": 0.1,
    "projection_dim": 16,
    "projection_size": 16,
    "sep_token_id": 2,
}
EYES: dict[str, Any] = SMALL | {"image_size": SIDE, "patch_size": 8, "attention_dropout": 0.1, "projection_dim": 16}
TWO: dict[str, Any] = {"text_config": WORDS, "vision_config": EYES, "projection_dim": 16}
SPEAKER: dict[str, Any] = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
LAYOUT: dict[str, Any] = TEXT | {"max_2d_position_embeddings": 32}
#: Four coordinates and two shapes fill the hidden size.
LAYOUT3: dict[str, Any] = LAYOUT | {"coordinate_size": 3, "shape_size": 2, "input_size": SIDE, "patch_size": 8}
REGIONS: dict[str, Any] = WORDS | {
    "num_hidden_layers": None,
    "visual_embedding_dim": 8,
    "visual_feat_dim": 8,
    "l_layers": 2,
    "x_layers": 1,
    "r_layers": 1,
}
FLAVA: dict[str, Any] = {
    "text_config": WORDS,
    "image_config": SMALL | {"image_size": SIDE, "patch_size": 8, "hidden_dropout_prob": 0.1},
    "multimodal_config": SMALL | {"hidden_dropout_prob": 0.1},
    "image_codebook_config": {"hidden_size": 8, "vocab_size": 8, "num_blocks_per_group": 1},
    "hidden_size": 16,
    "projection_dim": 16,
}
GROUPS: dict[str, Any] = {
    "text_config": WORDS | {"dropout": 0.1},
    "vision_config": EYES | {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2], "dropout": 0.1},
    "projection_dim": 16,
    "projection_intermediate_dim": 16,
}
QUERIES: dict[str, Any] = {
    "vision_config": EYES,
    "qformer_config": WORDS | {"encoder_hidden_size": 16, "cross_attention_frequency": 1},
    "text_config": WORDS | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
    "image_text_hidden_size": 16,
}
LLAVA: dict[str, Any] = {
    "text_config": SPEAKER | {"model_type": "llama"},
    "vision_config": EYES | {"model_type": "clip_vision_model"},
    "image_token_index": IMAGE,
    "image_token_id": IMAGE,
    "image_seq_length": 16,
    "vision_feature_layer": -1,
}
PALIGEMMA: dict[str, Any] = {
    "text_config": SPEAKER | {"model_type": "gemma"},
    "vision_config": EYES | {"model_type": "siglip_vision_model", "vision_use_head": False},
    "image_token_index": IMAGE,
    "image_token_id": IMAGE,
    "projection_dim": 16,
}
GEMMA: dict[str, Any] = {
    "text_config": SPEAKER | {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "vision_config": EYES | {"vision_use_head": False},
    "mm_tokens_per_image": 4,
    "image_token_id": IMAGE,
    "boi_token_index": 3,
    "eoi_token_index": 4,
}
IDEFICS: dict[str, Any] = {
    "text_config": SPEAKER | {"model_type": "llama"},
    "vision_config": EYES,
    "scale_factor": 2,
    "use_cache": False,
    "image_token_id": IMAGE,
    "pad_token_id": 0,
}
ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": 48,
    "vision_start_token_id": 47,
    "vision_end_token_id": 46,
}
QWEN2: dict[str, Any] = QWEN_TOKENS | {
    "text_config": SPEAKER | {"head_dim": None, "rope_parameters": ROPE},
    "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
}
QWEN3: dict[str, Any] = QWEN_TOKENS | {
    "text_config": SPEAKER | {"rope_parameters": ROPE},
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


def _image(batch: int, _length: int) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE)


def _boxes(batch: int, length: int) -> Tensor:
    """A box for each word `(batch, length, 4)`, its corners in order."""
    return torch.randint(20, (batch, length, 4)).sort(-1).values


def _album(batch: int, _length: int) -> Tensor:
    """One image for each text `(batch, 1, 3, side, side)`."""
    return _image(batch, 0)[:, None]


def _regions(batch: int, _length: int) -> Tensor:
    """What was seen in three regions of an image `(batch, 3, 8)`."""
    return torch.randn(batch, 3, 8)


def _corners(batch: int, _length: int) -> Tensor:
    """Where the three regions are `(batch, 3, 4)`."""
    return torch.rand(batch, 3, 4)


def _kinds(batch: int, _length: int) -> Tensor:
    return torch.ones(batch, 3, dtype=torch.long)


def _both(*, masked: bool = True, places: int = 0, **extra: Any) -> Inputs:
    """Text, with `places` tokens at its head that stand for an image, and what else a model takes."""

    def call(batch: int, size: int) -> Call:
        text = words(batch, LENGTHS[size], IMAGE - 3)
        ids = torch.cat([torch.full((batch, places), IMAGE), text], 1)
        inputs = {"input_ids": ids} | drawn(extra, batch, ids.shape[1])
        return (), inputs | ({"attention_mask": padding(*ids.shape)} if masked else {})

    return call


def _patches(width: int) -> Inputs:
    """Images as Qwen takes them: the patches of all in one list, and how many rows and columns each one has."""

    def call(batch: int, size: int) -> Call:
        inputs = _both(places=4)(batch, size)[1]
        grid = torch.tensor([[1, 4, 4]]).expand(batch, 3)
        kinds = (inputs["input_ids"] == IMAGE).int()
        pixels = torch.randn(batch * 16, width)
        return (), inputs | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    return call


def _joint(name: str, model: str, call: Inputs, **config: Any) -> Entry:
    """An entry from `config`, that text and images call."""
    return Entry(f"transformers/{name}", hugging(model, **config), call)


LOOKS: dict[str, Any] = {"visual_embeds": _regions, "visual_attention_mask": _kinds, "visual_token_type_ids": _kinds}
SEEN = _both(pixel_values=_image)
QUERIED = _both(places=4, pixel_values=_image)

ENTRIES: list[Entry] = [
    _joint("clip", "CLIPModel", SEEN, **TWO),
    _joint("siglip", "SiglipModel", SEEN, **TWO),
    _joint("chinese_clip", "ChineseCLIPModel", SEEN, **TWO),
    _joint("altclip", "AltCLIPModel", SEEN, **TWO),
    _joint("clipseg", "CLIPSegForImageSegmentation", SEEN, **TWO, extract_layers=[0, 1], reduce_dim=8),
    _joint("blip", "BlipForConditionalGeneration", SEEN, **TWO, image_text_hidden_size=16),
    _joint("blip_2", "Blip2ForConditionalGeneration", QUERIED, **QUERIES),
    _joint("groupvit", "GroupViTModel", SEEN, **GROUPS),
    _joint("owlvit", "OwlViTForObjectDetection", SEEN, **TWO),
    _joint("flava", "FlavaModel", SEEN, **FLAVA),
    _joint("vilt", "ViltForQuestionAnswering", SEEN, **WORDS, image_size=SIDE, patch_size=8, num_labels=5),
    _joint("git", "GitForCausalLM", SEEN, **WORDS, vision_config=EYES),
    _joint("layoutlm", "LayoutLMForTokenClassification", _both(bbox=_boxes), **LAYOUT),
    _joint("layoutlmv3", "LayoutLMv3ForTokenClassification", _both(bbox=_boxes, pixel_values=_image), **LAYOUT3),
    _joint("visual_bert", "VisualBertForQuestionAnswering", _both(**LOOKS), **WORDS, visual_embedding_dim=8),
    _joint("lxmert", "LxmertModel", _both(visual_feats=_regions, visual_pos=_corners), **REGIONS),
    _joint("llava", "LlavaForConditionalGeneration", _both(places=16, pixel_values=_image), **LLAVA),
    _joint("paligemma", "PaliGemmaForConditionalGeneration", _both(places=16, pixel_values=_image), **PALIGEMMA),
    _joint("gemma3_vision", "Gemma3ForConditionalGeneration", QUERIED, **GEMMA),
    _joint("idefics3", "Idefics3ForConditionalGeneration", _both(places=4, pixel_values=_album), **IDEFICS),
    _joint("qwen2_vl", "Qwen2VLForConditionalGeneration", _patches(96), **QWEN2),
    _joint("qwen3_vl", "Qwen3VLForConditionalGeneration", _patches(96), **QWEN3),
]
